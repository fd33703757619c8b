"""Predicted detections and masks: reading and writing files, gathering from all processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.arrays import Uint8
from pipelines.datasets.annotations import IGNORED, DenseSamples
from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.datasets.coco import describe_json_error, read_run_lengths
from pipelines.storage import read_json, write_atomic
from rotpred.distributed import Rank, gather_rows
from rotpred.metrics.detections import ImageDetections

_HIGHEST = float(np.finfo(np.float32).max)


def gather_detections(
    found: Mapping[int, ImageDetections], n: int, rank: Rank
) -> list[ImageDetections]:
    """Gather the detections of all processes: one per image, in order, on all ranks.

    All ranks must call. Only numbers and JSON text are sent; nothing is unpickled.

    Args:
        found: By position in the data set: detections of this process's images.
        n: Number of images in the data set.
        rank: This process.

    Raises:
        ValueError: An image is missing, occurs twice, or is not below n. Raised on all ranks.
    """
    images = sorted(found)
    parts = [found[i] for i in images]
    counts = [[i, len(one.boxes), len(one.masks)] for i, one in zip(images, parts, strict=True)]
    # Box, label and score: float64 holds all of them exactly.
    rows = [np.column_stack([one.boxes, one.labels, one.scores]) for one in parts]
    masks = json.dumps([mask for one in parts for mask in one.masks]).encode()
    columns = (
        torch.tensor(counts, dtype=torch.int64).reshape(-1, 3),
        torch.from_numpy(np.concatenate([np.zeros((0, 6)), *rows])),
        torch.frombuffer(bytearray(masks), dtype=torch.uint8),
    )
    gathered = zip(*(_gather_ragged(column, rank) for column in columns), strict=True)
    everything: dict[int, ImageDetections] = {}
    twice: set[int] = set()
    for counts_of, rows_of, masks_of in gathered:
        every_mask = json.loads(masks_of.numpy().tobytes())
        at = at_mask = 0
        for i, k, k_masks in counts_of.tolist():
            if i in everything:
                twice.add(i)
            mine = rows_of[at : at + k].numpy()
            everything[i] = ImageDetections(
                boxes=mine[:, :4].astype(np.float32),
                labels=mine[:, 4].astype(np.int64),
                scores=mine[:, 5].astype(np.float32),
                masks=tuple(every_mask[at_mask : at_mask + k_masks]),
            )
            at, at_mask = at + k, at_mask + k_masks
    wrong = sorted(twice | set(everything) ^ set(range(n)))
    if wrong:
        raise ValueError(
            f"{len(wrong)} images are missing, duplicate or not below {n}: {wrong[:5]}"
        )
    return [everything[i] for i in range(n)]


def _gather_ragged(tensor: torch.Tensor, rank: Rank) -> list[torch.Tensor]:
    """Gather tensors (N, ...) from all ranks, where N may differ."""
    lengths = gather_rows(torch.tensor([len(tensor)]), rank).tolist()
    if not any(lengths):
        return [tensor] * rank.world
    padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = gather_rows(padded, rank).reshape(rank.world, *padded.shape)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def write_detections(path: Path, found: Sequence[ImageDetections], samples: DenseSamples) -> None:
    """Write detections in COCO's results format: a JSON list of objects.

    image_id is the image's name, as a number if it is one without leading zeros. category_id is
    COCO's if the data set has such ids, else counts from 1 in the order of the classes.

    Args:
        path: Replaced atomically.
        found: One per image, in the order of the data set.
        samples: The data set.

    Raises:
        OSError: The file cannot be written; an existing file is unchanged.
    """
    rows = []
    for i, one in enumerate(found):
        name = samples.names[i]
        image: int | str = int(name) if name.isdecimal() and str(int(name)) == name else name
        boxes, labels, scores = (x.tolist() for x in (one.boxes, one.labels, one.scores))
        for k, (left, top, right, bottom) in enumerate(boxes):
            row: dict[str, object] = {
                "image_id": image,
                "category_id": samples.category_ids[labels[k]],
                "bbox": [left, top, right - left, bottom - top],
                "score": scores[k],
            }
            if one.masks:
                row["segmentation"] = one.masks[k]
            rows.append(row)
    write_atomic(path, json.dumps(rows).encode())


def read_detections(path: Path, samples: DenseSamples) -> list[ImageDetections]:
    """Read detections from a JSON file like `write_detections`'s, or a folder of VOC's text files.

    The folder has a file [ANYTHING_]CLASS.txt for every class, such as comp3_det_test_dog.txt. Its
    lines are `NAME SCORE XMIN YMIN XMAX YMAX`; pixels count from 1, and both corners belong to the
    box. A file may be empty. An image without a line or entry has no detections.

    Returns:
        One per image, in the order of the data set; detections in the order of the file.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: An entry or line is invalid, or a class has no file. The message names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    rows = (_read_text_files if path.is_dir() else _read_json)(path, samples)
    found = []
    for i, mine in enumerate(rows):
        masks = tuple(mask for *_, mask in mine if mask is not None)
        if len(masks) not in (0, len(mine)):
            raise ValueError(f"{path}: image {samples.names[i]}: not all detections have masks")
        found.append(
            ImageDetections(
                boxes=np.array([box for box, *_ in mine], np.float32).reshape(-1, 4),
                labels=np.array([label for _, label, *_ in mine], np.int64),
                scores=np.array([score for _, _, score, _ in mine], np.float32),
                masks=masks,
            )
        )
    return found


_Row = tuple[tuple[float, float, float, float], int, float, Mapping[str, object] | None]
"""Box, label, score and mask of a detection."""


def _read_json(path: Path, samples: DenseSamples) -> list[list[_Row]]:
    entries: list[dict[str, Any]] = read_json(path, list)
    images = {name: i for i, name in enumerate(samples.names)}
    labels = {number: label for label, number in enumerate(samples.category_ids)}
    rows: list[list[_Row]] = [[] for _ in images]
    for number, entry in enumerate(entries):
        try:
            i = images.get(str(entry["image_id"]))
            if i is None:
                raise ValueError(f"no image has image_id {entry['image_id']!r}")
            if entry["category_id"] not in labels:
                raise ValueError(f"no class has category_id {entry['category_id']!r}")
            left, top, width, height = (float(v) for v in entry["bbox"])
            mask = entry.get("segmentation")
            if mask is not None:
                if not isinstance(mask, dict) or not isinstance(mask["counts"], str):
                    raise ValueError("segmentation must be compressed run lengths")
                read_run_lengths(mask, *samples.sizes[i].tolist())
            _check_finite(left, top, left + width, top + height, score := float(entry["score"]))
            box = left, top, left + width, top + height
            rows[i].append((box, labels[entry["category_id"]], score, mask))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: entry {number}: {describe_json_error(error)}") from error
    return rows


def _read_text_files(folder: Path, samples: DenseSamples) -> list[list[_Row]]:
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.txt")):
        # The longest match: with classes dog and hot_dog, x_hot_dog.txt is hot_dog's.
        matching = [name for name in samples.classes if f"_{file.stem}".endswith(f"_{name}")]
        if not matching:
            raise ValueError(f"{file}: its name does not end in a class")
        name = max(matching, key=len)
        if name in files:
            raise ValueError(f"{files[name]} and {file} are both of class {name}: keep one")
        files[name] = file
    images = {name: i for i, name in enumerate(samples.names)}
    rows: list[list[_Row]] = [[] for _ in images]
    for label, name in enumerate(samples.classes):
        if name not in files:
            raise ValueError(f"{folder}: no file *_{name}.txt; for no detections, leave it empty")
        lines = files[name].read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                parts = line.split()
                if len(parts) != 6:
                    raise ValueError(f"expected NAME SCORE XMIN YMIN XMAX YMAX, got {line[:80]!r}")
                if parts[0] not in images:
                    raise ValueError(f"no image is called {parts[0]!r}")
                score, left, top, right, bottom = (float(part) for part in parts[1:])
                _check_finite(score, left, top, right, bottom)
                box = left - 1, top - 1, right, bottom
                rows[images[parts[0]]].append((box, label, score, None))
            except ValueError as error:
                raise ValueError(f"{files[name]}:{number}: {error}") from error
    return rows


def _check_finite(*values: float) -> None:
    """Raise ValueError for a number that is not finite in float32."""
    for value in values:
        if not abs(value) <= _HIGHEST:
            raise ValueError(f"{value} is not finite")


def read_masks(folder: Path, samples: DenseSamples, i: int, *, label_ids: bool = False) -> Uint8:
    """Read the predicted class of each pixel of an image from NAME.png or NAME_ANYTHING.png.

    The file is in the folder or, as for Cityscapes, in the subfolder named by NAME up to its first
    underscore. It has 8 bits, palette or grey; a pixel's number is its class.

    Args:
        folder: Folder of all predictions.
        samples: The data set.
        i: Position of the image.
        label_ids: Numbers are Cityscapes' label ids, as its server expects, not train ids.

    Returns:
        uint8 (h, w): classes; `IGNORED` for pixels so marked and for label ids without a class.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are several files, or the file is not a valid mask. The message names it.
    """
    name = samples.names[i]
    folders = [folder, folder / name.split("_")[0]]
    files = [one / f"{name}.png" for one in folders if (one / f"{name}.png").is_file()]
    if not files:
        files = [file for one in folders for file in sorted(one.glob(f"{escape(name)}_*.png"))]
    if not files:
        raise FileNotFoundError(f"{folder}: no {name}.png or {name}_*.png")
    if len(files) > 1:
        raise ValueError(f"{files[0]} and {files[1]} are both of image {name}: keep one")
    table = np.full(256, IGNORED if label_ids else -1, np.int64)
    numbers = LABEL_IDS if label_ids else range(len(samples.classes))
    table[list(numbers)], table[IGNORED] = np.arange(len(numbers)), IGNORED
    return samples.read_mask(i, files[0], table)
