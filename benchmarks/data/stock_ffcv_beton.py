"""Write a folder of JPEG files with FFCV's own writer: FOLDER OUTPUT MAX_SIDE.

A program of its own, because that writer's workers are forked from a process that must hold little.
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
