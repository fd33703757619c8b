"""Write a folder of JPEG files with FFCV's own writer: FOLDER OUTPUT MAX_SIDE.

A separate program, because that writer forks its workers: the parent's memory must be small.
"""

import os
import sys
from pathlib import Path

from contestants.writers import StockFiles, write_stock

if __name__ == "__main__":
    folder, output, side = sys.argv[1:]
    partial = Path(f"{output}.part")
    cores = len(os.sched_getaffinity(0))
    write_stock(StockFiles(folder), partial, workers=cores, max_side=int(side))
    partial.rename(output)
