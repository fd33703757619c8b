"""Tiny data sets for detection and segmentation, in the layouts of the large ones.

Images are grey noise with one rectangle per object, in the color of its class. Rectangles do not
overlap, so that tests can find the objects in the pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.datasets.voc_classification import VOC_CLASSES
from tests.support.images import save_jpeg

Pixels = npt.NDArray[np.uint8]

COLORS = ((230, 30, 30), (30, 200, 40), (40, 60, 240), (235, 220, 30))
"""Colors of objects, by class."""
VOC_USED = ("dog", "person", "aeroplane")
"""Classes of the VOC data sets, in the order of COLORS."""
COCO_CATEGORIES = ((3, "car"), (1, "person"), (18, "dog"))
"""Ids, neither contiguous nor sorted, and names, in the order of COLORS."""
ROAD, SKY, CAR, EGO, POLE_GROUP = 7, 23, 26, 1, 18
"""Raw label ids of Cityscapes; the last two are ignored."""


class Box(NamedTuple):
    """One object; right and bottom are exclusive."""

    kind: int
    """Index into COLORS and the classes in use."""
    left: int
    top: int
    right: int
    bottom: int


def scene(seed: int, height: int, width: int, count: int = 2) -> tuple[Pixels, list[Box]]:
    """Noise with rectangles, each in its own section along the long side.

    Returns:
        uint8 (height, width, 3) and the objects.
    """
    draw = np.random.default_rng(seed)
    grey = draw.integers(100, 150, (height, width, 1), np.uint8)
    pixels, boxes = np.repeat(grey, 3, axis=2), []
    part = max(height, width) // count
    for i in range(count):
        cell = (part, width) if height > width else (height, part)
        h, w = (int(draw.integers(side * 2 // 5, side * 4 // 5)) for side in cell)
        top, left = (int(draw.integers(1, side - n)) for side, n in zip(cell, (h, w), strict=True))
        top, left = (top + i * part, left) if height > width else (top, left + i * part)
        kind = int(draw.integers(len(COLORS) - 1))
        boxes.append(Box(kind, left, top, left + w, top + h))
        pixels[top : top + h, left : left + w] = COLORS[kind]
    return pixels, boxes


def voc(base: Path, n: int = 8, side: int = 96) -> Path:
    """VOCdevkit with VOC2007 (trainval, test) and VOC2012 (trainval), n images in each list.

    Every third image is in portrait format; the second object of every fourth is difficult.

    Returns:
        The folder VOCdevkit.
    """
    root = base / "VOCdevkit"
    for number, (year, part) in enumerate(
        (("2007", "trainval"), ("2007", "test"), ("2012", "trainval"))
    ):
        folder, stems = root / f"VOC{year}", []
        for i in range(n):
            stem = f"{number:03}{i:03}" if year == "2007" else f"2008_{i:06}"
            shape = (side * 4 // 3, side) if i % 3 == 2 else (side, side * 4 // 3)
            pixels, boxes = scene(100 * number + i, *shape)
            save_jpeg(folder / f"JPEGImages/{stem}.jpg", Image.fromarray(pixels))
            flags = [i % 4 == 3 and k == 1 for k in range(len(boxes))]
            write(folder / f"Annotations/{stem}.xml", voc_xml(stem, shape, boxes, flags))
            stems.append(stem)
        write(folder / f"ImageSets/Main/{part}.txt", stems)
    return root


def voc_xml(
    stem: str, shape: tuple[int, int], boxes: Sequence[Box], difficult: Sequence[bool]
) -> list[str]:
    """Lines of an annotation file. Corners count from 1 and both belong to the object."""
    lines = [
        "<annotation>",
        f"\t<filename>{stem}.jpg</filename>",
        f"\t<size><width>{shape[1]}</width><height>{shape[0]}</height><depth>3</depth></size>",
    ]
    for box, flag in zip(boxes, difficult, strict=True):
        lines += [
            "\t<object>",
            f"\t\t<name>{VOC_USED[box.kind]}</name>",
            "\t\t<truncated>0</truncated>",
            f"\t\t<difficult>{int(flag)}</difficult>",
            f"\t\t<bndbox><xmin>{box.left + 1}</xmin><ymin>{box.top + 1}</ymin>",
            f"\t\t<xmax>{box.right}</xmax><ymax>{box.bottom}</ymax></bndbox>",
            "\t</object>",
        ]
    return [*lines, "</annotation>"]


def voc_masks(base: Path, n: int = 8, side: int = 96) -> Path:
    """VOCdevkit with VOC2012 segmentation (train, val) and aug of SBD, n images in each list.

    Objects have a border of one ignored pixel, inside their rectangles. Masks of aug and of
    train_aug (train and aug together) are grey images in SegmentationClassAug, without borders;
    those of train and val have VOC's palette.

    Returns:
        The folder VOCdevkit.
    """
    folder = base / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    stems: dict[str, list[str]] = {}
    for number, part in enumerate(("train", "val", "aug"), 3):
        stems[part] = []
        for i in range(n):
            stem = f"2009_{number}{i:05}"
            shape = (side * 4 // 3, side) if i % 3 == 2 else (side, side * 4 // 3)
            pixels, boxes = scene(100 * number + i, *shape)
            save_jpeg(folder / f"JPEGImages/{stem}.jpg", Image.fromarray(pixels))
            if part != "aug":
                _png(folder / f"SegmentationClass/{stem}.png", voc_mask(shape, boxes), palette=True)
            if part != "val":
                whole = voc_mask(shape, boxes, border=0)
                _png(folder / f"SegmentationClassAug/{stem}.png", whole)
            stems[part].append(stem)
        write(lists / f"{part}.txt", stems[part])
    write(lists / "train_aug.txt", stems["train"] + stems["aug"])
    return base / "VOCdevkit"


def voc_mask(shape: tuple[int, int], boxes: Iterable[Box], border: int = 1) -> Pixels:
    """uint8 (h, w): VOC's class ids, background 0, borders 255."""
    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        mask[box.top : box.bottom, box.left : box.right] = 255
        inner = np.s_[
            box.top + border : box.bottom - border, box.left + border : box.right - border
        ]
        mask[inner] = 1 + VOC_CLASSES.index(VOC_USED[box.kind])
    return mask


def coco(base: Path, n: int = 8, side: int = 96) -> Path:
    """COCO 2017 with train2017 and val2017, n images in each and one more without annotation.

    The first object of each image is a polygon, the second one a polygon of two parts (the left
    and the right third of its rectangle). The second image has a crowd as well, in run lengths.

    Returns:
        The folder that holds annotations, train2017 and val2017.
    """
    root = base / "coco"
    for number, part in enumerate(("train2017", "val2017"), 6):
        images, annotations = [], []
        for i in range(n + 1):
            # Ids are not in the order of the file.
            image = 1000 * number + 7 * ((i * 5) % (n + 1))
            name = f"{image:012}.jpg"
            height, width = (side * 4 // 3, side) if i % 3 == 2 else (side, side * 4 // 3)
            pixels, boxes = scene(100 * number + i, height, width)
            if i == n:
                pixels, boxes = pixels[:, :, :1].repeat(3, axis=2) // 2 + 60, []
            save_jpeg(root / part / name, Image.fromarray(pixels))
            images.append({"id": image, "file_name": name, "height": height, "width": width})
            for k, box in enumerate(boxes):
                polygons = [_corners(box)] if k == 0 else _thirds(box)
                area = sum((p[4] - p[0]) * (p[5] - p[1]) for p in polygons)
                annotations.append(_annotation(len(annotations), image, box, area, polygons))
            if i == 1:
                crowd = np.zeros((height, width), np.uint8)
                crowd[: height // 4, : width // 4] = 1
                region = {"size": [height, width], "counts": run_lengths(crowd)}
                where = Box(boxes[0].kind, 0, 0, width // 4, height // 4)
                annotations.append(
                    _annotation(len(annotations), image, where, int(crowd.sum()), region)
                )
        content = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in COCO_CATEGORIES],
        }
        write(root / f"annotations/instances_{part}.json", [json.dumps(content)])
    return root


def run_lengths(mask: Pixels) -> list[int]:
    """COCO's uncompressed run lengths: column by column, beginning with zeros."""
    flat = mask.T.reshape(-1) != 0
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    lengths = np.diff([0, *edges, len(flat)]).tolist()
    return [0, *lengths] if flat[0] else lengths


def _annotation(number: int, image: int, box: Box, area: int, outline: object) -> dict[str, object]:
    return {
        "id": 50 + 3 * number,
        "image_id": image,
        "category_id": COCO_CATEGORIES[box.kind][0],
        "bbox": [box.left, box.top, box.right - box.left, box.bottom - box.top],
        "area": area,
        "iscrowd": int(isinstance(outline, dict)),
        "segmentation": outline,
    }


def _corners(box: Box) -> list[int]:
    return [
        *(box.left, box.top, box.right, box.top, box.right, box.bottom, box.left, box.bottom),
    ]


def _thirds(box: Box) -> list[list[int]]:
    third = (box.right - box.left) // 3
    left, right = box._replace(right=box.left + third), box._replace(left=box.right - third)
    return [_corners(left), _corners(right)]


def cityscapes(base: Path, n: int = 6, height: int = 64, width: int = 128) -> Path:
    """Cityscapes with train and val, n images in two cities each, masks of raw label ids.

    Sky above, road below, cars, and two ids without a class: the ego vehicle in the lowest rows and
    a group of poles in the upper left corner.

    Returns:
        The folder that holds leftImg8bit and gtFine.
    """
    root = base / "cityscapes"
    for number, (part, cities) in enumerate(
        (("train", ("aachen", "ulm")), ("val", ("frankfurt", "lindau"))), 9
    ):
        for i in range(n):
            city = cities[i % 2]
            noise, boxes = scene(100 * number + i, height, width)
            mask = np.full((height, width), SKY, np.uint8)
            mask[height // 2 :] = ROAD
            pixels = noise // 2
            pixels[: height // 2, :, 2] += 120
            for box in boxes:
                mask[box.top : box.bottom, box.left : box.right] = CAR
                pixels[box.top : box.bottom, box.left : box.right] = COLORS[0]
            mask[-3:], mask[:4, :4] = EGO, POLE_GROUP
            stem = f"{city}_{i:06}_000019"
            _png(root / f"leftImg8bit/{part}/{city}/{stem}_leftImg8bit.png", pixels)
            _png(root / f"gtFine/{part}/{city}/{stem}_gtFine_labelIds.png", mask)
    return root


def colored(path: Path, kind: int) -> npt.NDArray[np.bool_]:
    """Mask of the pixels with the color of this kind of object, (height, width) bool."""
    pixels = np.asarray(Image.open(path)).astype(int)
    return (abs(pixels - COLORS[kind]) < 60).all(axis=2)


def check_box(there: npt.NDArray[np.bool_], box: npt.NDArray[np.float32]) -> None:
    """Assert that the box is filled with the color and that no pixel around it has the color."""
    left, top, right, bottom = map(int, box)
    assert there[top:bottom, left:right].all()
    around = there[top - 1 : bottom + 1, left - 1 : right + 1].sum()
    assert around == (bottom - top) * (right - left)


def write(path: Path, lines: Iterable[str]) -> None:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _png(path: Path, pixels: Pixels, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)
