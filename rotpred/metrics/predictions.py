"""Detections and masks in files, of this project or of other programs, and over processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from pipelines.datasets.annotations import IGNORED, DenseSamples
from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.imaging.decode import ImageError, read_numbers
from rotpred.distributed import Rank, gather_rows
from rotpred.files import write_atomic
from rotpred.metrics.coco_detection import check_runs
from rotpred.metrics.detections import ImageDetections

_HIGHEST = float(np.finfo(np.float32).max)


@runtime_checkable
class _Numbered(Protocol):
    """A data set whose classes have numbers of their own, as COCO's."""

    category_ids: tuple[int, ...]


def gather_detections(
    found: Mapping[int, ImageDetections], n: int, rank: Rank
) -> list[ImageDetections]:
    """Bring what each process detected together: one per image, in order, on all ranks.

    All ranks call. What travels is numbers and JSON text: nothing is unpickled.

    Args:
        found: of this process's images, by their position; any number of them.
        n: images in the data set.
        rank: of this process.

    Raises:
        ValueError: on all ranks: an image is lacking, comes twice, or is not below n.
    """
    images = sorted(found)
    parts = [found[i] for i in images]
    heads = [[i, len(one.boxes), len(one.masks)] for i, one in zip(images, parts, strict=True)]
    boxes = [np.zeros((0, 4), np.float32), *(one.boxes for one in parts)]
    labels = [np.zeros(0, np.int64), *(one.labels for one in parts)]
    scores = [np.zeros(0, np.float32), *(one.scores for one in parts)]
    masks = json.dumps([mask for one in parts for mask in one.masks]).encode()
    gathered = zip(
        _ragged(torch.tensor(heads, dtype=torch.int64).reshape(-1, 3), rank),
        *(_ragged(torch.from_numpy(np.concatenate(x)), rank) for x in (boxes, labels, scores)),
        _ragged(torch.frombuffer(bytearray(masks), dtype=torch.uint8), rank),
        strict=True,
    )
    everything: dict[int, ImageDetections] = {}
    twice: set[int] = set()
    for heads_of, boxes_of, labels_of, scores_of, masks_of in gathered:
        every_mask = json.loads(masks_of.numpy().tobytes())
        at = at_mask = 0
        for i, k, k_masks in heads_of.tolist():
            if i in everything:
                twice.add(i)
            everything[i] = ImageDetections(
                boxes=boxes_of[at : at + k].numpy(),
                labels=labels_of[at : at + k].numpy(),
                scores=scores_of[at : at + k].numpy(),
                masks=tuple(every_mask[at_mask : at_mask + k_masks]),
            )
            at, at_mask = at + k, at_mask + k_masks
    wrong = sorted(twice | set(everything) ^ set(range(n)))
    if wrong:
        raise ValueError(f"{len(wrong)} images lack, come twice or are not below {n}: {wrong[:5]}")
    return [everything[i] for i in range(n)]


def _ragged(tensor: torch.Tensor, rank: Rank) -> list[torch.Tensor]:
    """The tensors (N, ...) of all ranks, where N differs."""
    lengths = gather_rows(torch.tensor([len(tensor)]), rank).tolist()
    if not any(lengths):
        return [tensor] * rank.world
    padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = gather_rows(padded, rank).reshape(rank.world, *padded.shape)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def write_detections(path: Path, found: Sequence[ImageDetections], samples: DenseSamples) -> None:
    """Write detections as COCO's results are written: a JSON list of objects.

    image_id is the image's name, a number where it is one without leading zeros; category_id is
    COCO's where the data set has such, else counts from 1 in the order of the classes.

    Raises:
        OSError: it cannot be written; what was at `path` is there as before.
    """
    categories = _categories(samples)
    rows = []
    for i, one in enumerate(found):
        name = samples.names[i]
        image: int | str = int(name) if name.isdecimal() and str(int(name)) == name else name
        boxes, labels, scores = (x.tolist() for x in (one.boxes, one.labels, one.scores))
        for k, (left, top, right, bottom) in enumerate(boxes):
            row: dict[str, object] = {
                "image_id": image,
                "category_id": categories[labels[k]],
                "bbox": [left, top, right - left, bottom - top],
                "score": scores[k],
            }
            if one.masks:
                row["segmentation"] = one.masks[k]
            rows.append(row)
    write_atomic(path, json.dumps(rows).encode())


def read_detections(path: Path, samples: DenseSamples) -> list[ImageDetections]:
    """Read detections: a JSON file as `write_detections` writes, or a folder of VOC's text files.

    The folder has a file [ANYTHING_]CLASS.txt for every class, as comp3_det_test_dog.txt, possibly
    empty, with lines `NAME SCORE XMIN YMIN XMAX YMAX`, corners counted from 1 and both part of the
    box. An image without a line or entry has no detections.

    Returns:
        One per image, in the order of the data set, detections in the order of the file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: an entry or line that is wrong, or a class without a file; says which.
    """
    if path.is_dir():
        rows = _devkit(path, samples)
    elif path.is_file():
        rows = _results(path, samples)
    else:
        raise FileNotFoundError(f"{str(path)!r} does not exist")
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


def _categories(samples: DenseSamples) -> tuple[int, ...]:
    if isinstance(samples, _Numbered):
        return samples.category_ids
    return tuple(range(1, len(samples.classes) + 1))


def _results(path: Path, samples: DenseSamples) -> list[list[_Row]]:
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of detections, got a {type(entries).__name__}")
    images = {name: i for i, name in enumerate(samples.names)}
    labels = {number: label for label, number in enumerate(_categories(samples))}
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
                check_runs(mask, *samples.sizes[i].tolist())
            _checked(left, top, left + width, top + height, score := float(entry["score"]))
            box = left, top, left + width, top + height
            rows[i].append((box, labels[entry["category_id"]], score, mask))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error}" if type(error) is ValueError else f"{type(error).__name__} {error}"
            raise ValueError(f"{path}: entry {number}: {what}") from error
    return rows


def _devkit(folder: Path, samples: DenseSamples) -> list[list[_Row]]:
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.txt")):
        # The longest: of the classes dog and hot_dog, x_hot_dog.txt belongs to the second.
        fitting = [name for name in samples.classes if f"_{file.stem}".endswith(f"_{name}")]
        if not fitting:
            raise ValueError(f"{file}: no class is called like the end of its name")
        name = max(fitting, key=len)
        if name in files:
            raise ValueError(f"{files[name]} and {file} are both of class {name}: keep one")
        files[name] = file
    images = {name: i for i, name in enumerate(samples.names)}
    rows: list[list[_Row]] = [[] for _ in images]
    for label, name in enumerate(samples.classes):
        if name not in files:
            raise ValueError(f"{folder}: no file *_{name}.txt; one without detections is empty")
        lines = files[name].read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                parts = line.split()
                if len(parts) != 6:
                    raise ValueError(f"expected NAME SCORE XMIN YMIN XMAX YMAX, got {line[:80]!r}")
                if parts[0] not in images:
                    raise ValueError(f"no image is called {parts[0]!r}")
                score, left, top, right, bottom = (float(part) for part in parts[1:])
                _checked(score, left, top, right, bottom)
                box = left - 1, top - 1, right, bottom
                rows[images[parts[0]]].append((box, label, score, None))
            except ValueError as error:
                raise ValueError(f"{files[name]}:{number}: {error}") from error
    return rows


def _checked(*values: float) -> None:
    """Refuse numbers that float32 has not as finite ones."""
    for value in values:
        if not abs(value) <= _HIGHEST:
            raise ValueError(f"{value} is not finite")


def read_masks(
    folder: Path, samples: DenseSamples, i: int, *, label_ids: bool = False
) -> npt.NDArray[np.uint8]:
    """Read the predicted classes of an image's pixels from NAME.png or NAME_ANYTHING.png.

    The file lies in the folder or, as Cityscapes' do, in one below it that is called as the name
    begins: NAME up to the first underscore. Palette or grey, 8 bits; the number is the class.

    Args:
        folder: of all predictions.
        samples: of which data set.
        i: position of the image.
        label_ids: the numbers are Cityscapes' label ids, as its server takes them, not train ids.

    Returns:
        uint8 (h, w), classes; `IGNORED` where the file says so or the label id has no class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are several, or it is no such image; says which.
    """
    name = samples.names[i]
    places = [folder, folder / name.split("_")[0]]
    files = [place / f"{name}.png" for place in places if (place / f"{name}.png").is_file()]
    if not files:
        files = [file for place in places for file in sorted(place.glob(f"{escape(name)}_*.png"))]
    if not files:
        raise FileNotFoundError(f"{folder}: no {name}.png or {name}_*.png")
    if len(files) > 1:
        raise ValueError(f"{files[0]} and {files[1]} are both of image {name}: keep one")
    try:
        mask = read_numbers(files[0])
    except ImageError as error:
        raise ValueError(str(error)) from error
    height, width = samples.sizes[i].tolist()
    if mask.shape != (height, width):
        raise ValueError(f"{files[0]}: size {mask.shape[::-1]}, the image has {(width, height)}")
    if label_ids:
        table = np.full(256, IGNORED, np.uint8)
        table[list(LABEL_IDS)] = np.arange(len(LABEL_IDS))
        mask = table[mask]
    alien = mask[(mask >= len(samples.classes)) & (mask != IGNORED)]
    if len(alien):
        raise ValueError(f"{files[0]}: {alien[0]} is none of the {len(samples.classes)} classes")
    return mask
