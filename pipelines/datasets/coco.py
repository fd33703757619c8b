"""COCO instances: boxes and outlines from one JSON file."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.arrays import Int64, Uint8
from pipelines.datasets.annotations import (
    AnnotatedImage,
    AnnotationErrors,
    Objects,
    ObjectSamples,
    clip,
    pack,
)
from pipelines.datasets.files import IndexFormatError, read_json, require_folder


def import_pycocotools(module: str) -> Any:
    """Import a submodule of pycocotools.

    Raises:
        ValueError: pycocotools is not installed.
    """
    try:
        return importlib.import_module(f"pycocotools.{module}")
    except ImportError as error:
        raise ValueError("this needs pycocotools: pip install -e '.[eval]'") from error


class CocoSamples(ObjectSamples):
    """COCO images, sorted by id. Names are the ids as text."""

    outlined = True
    least_side = 32  # mmdetection's filter_cfg (configs/_base_/datasets/coco_instance.py)

    def __init__(
        self,
        categories: Mapping[int, str],
        images: Sequence[AnnotatedImage],
        objects: Sequence[Objects],
    ) -> None:
        """
        Args:
            categories: Class names by COCO id, in the order of the classes.
            images: The N images.
            objects: The objects of each image, with outlines.
        """
        self._outlines = [_PackedOutlines(one.outlines) for one in objects]
        super().__init__(
            tuple(categories.values()),
            images,
            [replace(one, outlines=()) for one in objects],
            outlines=itertools.chain.from_iterable(one.hash_input() for one in self._outlines),
        )
        self.category_ids = tuple(categories)

    def objects(self, i: int) -> Objects:
        """Return the objects of image i, including crowds."""
        return replace(super().objects(i), outlines=self._outlines[i].unpack())


class _PackedOutlines:
    """The outlines of all objects of an image, in one array."""

    def __init__(self, outlines: Sequence[Any]) -> None:
        self._runs = {k: one for k, one in enumerate(outlines) if isinstance(one, dict)}
        polygons = [[] if k in self._runs else one for k, one in enumerate(outlines)]
        self._lengths = [[len(polygon) for polygon in one] for one in polygons]
        parts = itertools.chain.from_iterable(polygons)
        self._numbers = np.concatenate([np.empty(0, np.float64), *parts])

    def unpack(self) -> tuple[object, ...]:
        """Return the outlines as COCO stores them."""
        numbers = iter(self._numbers.tolist())
        polygons = [[[*itertools.islice(numbers, n)] for n in one] for one in self._lengths]
        return tuple(self._runs.get(k, one) for k, one in enumerate(polygons))

    def hash_input(self) -> Iterable[bytes]:
        """Return bytes that identify the outlines."""
        return self._numbers.tobytes(), repr((self._lengths, self._runs)).encode()


def index_objects(
    name: str,
    root: str | os.PathLike[str],
    *,
    errors: AnnotationErrors,
    limit: int | None = None,
) -> CocoSamples:
    """Index the images in folder NAME, with the objects in annotations/instances_NAME.json.

    Sizes are those in the file. An image of another size is an error when it is decoded.

    Args:
        name: Name of the split, such as train2017.
        root: The folder that contains annotations and NAME.
        errors: Counts wrong annotations and missing images.
        limit: Number of images to take, in the order of ids. None: all.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: The file is malformed, no image is left, there are too many errors, or
            pycocotools, which training and validation need, is not installed.
    """
    source, folder = Path(root) / "annotations" / f"instances_{name}.json", Path(root) / name
    require_folder(folder)
    # Fail now if it is missing: reading takes minutes, and the threads need it only after that.
    import_pycocotools("mask")
    images, categories, annotations = _content(source)
    labels = {number: label for label, number in enumerate(categories)}
    chosen = dict(itertools.islice(sorted(images.items()), limit))
    present = set(os.listdir(folder))
    annotated = {}
    for number, (file, height, width) in chosen.items():
        if file in present:
            annotated[number] = AnnotatedImage(str(number), str(folder / file), height, width)
        else:
            errors.add(f"{source}: image id {number}", f"no image {str(folder / file)!r}")
    rows: dict[int, list[tuple[Any, ...]]] = {number: [] for number in annotated}
    outlines: dict[int, list[object]] = {number: [] for number in annotated}
    annotations.reverse()
    while annotations:  # Free each one as soon as it is read: those of train2017 take gigabytes.
        one = annotations.pop()
        try:
            number = int(one["image_id"])
            if number not in images:
                raise ValueError(f"no image id {number}")
            if number not in annotated:
                continue  # beyond the limit, or the missing image was already counted
            row, outline = _object(one, labels, annotated[number])
        except (KeyError, TypeError, ValueError) as error:
            where = one.get("id") if isinstance(one, dict) else repr(one)[:50]
            errors.add(f"{source}: annotation id {where}", describe_json_error(error))
            continue
        rows[number].append(row)
        outlines[number].append(outline)
    if not annotated:
        raise IndexFormatError(f"{source}: no image is left in {str(folder)!r}")
    found = [pack(rows[n], outlines[n]) for n in annotated]
    return CocoSamples(categories, list(annotated.values()), found)


def rasterize(outlines: Sequence[object], height: int, width: int) -> Uint8:
    """Convert outlines to masks. Polygons are rasterized by pycocotools.

    Args:
        outlines: K polygons or run lengths, as COCO stores them.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.

    Returns:
        uint8 (K, height, width), 0 or 1.

    Raises:
        ValueError: Run lengths do not add up to the size of the image, or are negative.
    """
    masks = np.empty((len(outlines), height, width), np.uint8)
    for mask, outline in zip(masks, outlines, strict=True):
        runs = outline if isinstance(outline, dict) else merge_polygons(outline, height, width)
        lengths = read_run_lengths(runs, height, width)
        values = np.arange(len(lengths), dtype=np.uint8) & 1
        mask[:] = np.repeat(values, lengths).reshape(width, height).T
    return masks


def read_run_lengths(runs: Mapping[str, Any], height: int, width: int) -> Int64:
    """Return the run lengths of a mask, int64 (runs,), in pixels.

    Args:
        runs: {"size": [height, width], "counts": a list, or compressed as str or bytes}.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.

    Raises:
        ValueError: The size differs, or the run lengths are damaged, negative or do not add up to
            it. pycocotools hangs on some of these and reads past the end of others.
    """
    if list(runs["size"]) != [height, width]:
        raise ValueError(f"run lengths of size {runs['size']}, the image has {[height, width]}")
    counts = runs["counts"]
    lengths = np.array(counts) if isinstance(counts, list) else _decode_run_lengths(counts)
    if lengths.min(initial=0) < 0 or lengths.sum() != height * width:
        raise ValueError(f"run lengths of {lengths.sum()} pixels do not add up to {width}x{height}")
    return lengths


def _decode_run_lengths(counts: str | bytes) -> Int64:
    """Decode COCO's compressed run lengths.

    A number is stored in groups of five bits, lowest first, one group per character, offset by 48.
    The sixth bit says that more groups follow. From the fourth number on, the difference to the
    number two places before is stored.

    Args:
        counts: The compressed run lengths, ASCII.

    Returns:
        int64 (runs,), the lengths in pixels.

    Raises:
        ValueError: There are none, or the last one lacks groups.
    """
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    bits = codes.astype(np.int64) - 48
    if not len(bits) or bits[-1] & 32:
        raise ValueError("run lengths that do not add up: they end within a number")
    starts = np.flatnonzero(np.r_[True, bits[:-1] & 32 == 0])
    lengths = np.diff(np.r_[starts, len(bits)])
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((bits & 31) << shifts, starts)
    negative = bits[starts + lengths - 1] & 16 != 0
    numbers[negative] -= 1 << 5 * lengths[negative]
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def merge_polygons(outline: object, height: int, width: int) -> dict[str, Any]:
    """Convert the polygons of one object to compressed run lengths of their union."""
    tools = import_pycocotools("mask")
    runs: dict[str, Any] = tools.merge(tools.frPyObjects(outline, height, width))
    return runs


def describe_json_error(error: Exception) -> str:
    """Return what is wrong with an entry of a JSON file that raised this error."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return f"{error}" if type(error) is ValueError else f"{type(error).__name__} {error}"


def _content(source: Path) -> tuple[dict[int, tuple[str, int, int]], dict[int, str], list[Any]]:
    """Read file and size by image id, name by category id (sorted), and the annotations."""
    content = read_json(source)
    try:
        images = {
            int(one["id"]): (str(one["file_name"]), int(one["height"]), int(one["width"]))
            for one in content["images"]
        }
        categories = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        annotations = content["annotations"]
        if len(images) != len(content["images"]) or len(categories) != len(content["categories"]):
            raise ValueError("an id is used twice")
        if not isinstance(annotations, list):
            raise TypeError("annotations is not a list")
    except (KeyError, TypeError, ValueError) as error:
        what = f"expected images, annotations and categories: {type(error).__name__} {error}"
        raise IndexFormatError(f"{source}: {what}") from error
    return images, dict(sorted(categories.items())), annotations


def _object(
    one: Mapping[str, Any], labels: Mapping[int, int], image: AnnotatedImage
) -> tuple[tuple[Any, ...], object]:
    """Return the row (box, label, difficult, crowd) and the outline of an annotation.

    The outline is run lengths, or one array per polygon: lists of Python floats would take four
    times the memory.
    """
    if one["category_id"] not in labels:
        raise ValueError(f"no category id {one['category_id']}")
    left, top, width, height = (float(v) for v in one["bbox"])
    size = {"height": image.height, "width": image.width}
    box = clip(left, top, left + width, top + height, **size)
    outline = one["segmentation"]
    if isinstance(outline, dict):
        if list(outline["size"]) != [image.height, image.width]:
            raise ValueError(f"run lengths of {outline['size']} pixels, the image has {size}")
        if not isinstance(outline["counts"], str | list):
            raise ValueError("run lengths are neither a list nor text")
    else:
        outline = [np.array(part, np.float64) for part in outline]
        if not outline or any(p.ndim != 1 or len(p) < 6 or len(p) % 2 for p in outline):
            raise ValueError("a polygon with fewer than three points")
        if not all(np.isfinite(part).all() for part in outline):
            raise ValueError("a polygon with coordinates that are not finite")
    return (box, labels[one["category_id"]], False, bool(one.get("iscrowd", 0))), outline
