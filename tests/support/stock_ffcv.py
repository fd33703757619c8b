"""Stock FFCV reads a beton, in a separate process.

Its memory managers set `mutable` of array types that numba shares among all functions. The key
under which numba has stored a compiled function then has another hash, and numba's finalizer raises
KeyError whenever the garbage collector reaches that function.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.support import processes
from tests.support.engines import need

_BATCH = 4


def read_with_stock_ffcv(
    folder: Path, *betons: tuple[Path, bool]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read betons whose images have one size, in file order; skip the test without ffcv.

    Args:
        folder: For the results and for what the process prints.
        betons: File, and whether to read through the page cache (`os_cache`).

    Returns:
        For each beton uint8 (N, H, W, 3) images and int64 (N,) labels.
    """
    need("ffcv")
    console = folder / "stock_ffcv.txt"
    status = processes.run(_save, folder, betons, console=console)
    assert status == [0], console.read_text()
    found = []
    for number in range(len(betons)):
        with np.load(folder / f"stock_ffcv_{number}.npz", allow_pickle=False) as arrays:
            found.append((arrays["images"], arrays["labels"]))
    return found


def _save(folder: Path, betons: Sequence[tuple[Path, bool]]) -> int:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    for number, (path, os_cache) in enumerate(betons):
        loader = Loader(
            str(path),
            batch_size=_BATCH,
            num_workers=1,
            os_cache=os_cache,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
        )
        # FFCV reuses the memory of a batch.
        batches = [(np.array(images), np.array(labels)) for images, labels in loader]
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        np.savez(folder / f"stock_ffcv_{number}.npz", images=images, labels=labels[:, 0])
    return 0
