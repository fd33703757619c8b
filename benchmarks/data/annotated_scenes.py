"""Photographs with synthetic annotations, in the layouts of VOC, COCO and Cityscapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.photographs import photographs
from pipelines.datasets.voc_classification import VOC_CLASSES

OBJECTS = 4
"""Per image."""
CITY = (2048, 1024)
"""Width and height of Cityscapes' images in pixels."""

Boxes = npt.NDArray[np.int64]
"""(OBJECTS, 4): left, top, right, bottom in pixels, right and bottom exclusive."""


def voc(folder: Path, count: int) -> Path:
    """Write VOC2007 with the list trainval.

    Args:
        folder: Where to write.
        count: Number of images.

    Returns:
        The root, for the data voc:2007/trainval.
    """
    base = folder / "VOC2007"
    for place, boxes, image in _scenes(folder, count, base / "JPEGImages"):
        objects = "".join(
            f"<object><name>{VOC_CLASSES[i]}</name><difficult>0</difficult><bndbox>"
            f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
            "</bndbox></object>"
            for i, (x0, y0, x1, y1) in enumerate(boxes.tolist())
        )
        size = f"<width>{image.width}</width><height>{image.height}</height><depth>3</depth>"
        _text(base / "Annotations" / f"{place.stem}.xml", _xml(place.name, size, objects))
    stems = sorted(path.stem for path in (base / "JPEGImages").iterdir())
    _text(base / "ImageSets" / "Main" / "trainval.txt", "".join(f"{s}\n" for s in stems))
    return folder


def voc_masks(folder: Path, count: int) -> Path:
    """Write VOC2012 with the segmentation list train; see `voc`."""
    base = folder / "VOC2012"
    for place, boxes, image in _scenes(folder, count, base / "JPEGImages"):
        mask = Image.fromarray(_mask(boxes, image, lambda i: i + 1, 0))
        (base / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(base / "SegmentationClass" / f"{place.stem}.png")
    stems = sorted(path.stem for path in (base / "JPEGImages").iterdir())
    _text(base / "ImageSets" / "Segmentation" / "train.txt", "".join(f"{s}\n" for s in stems))
    return folder


def coco(folder: Path, count: int) -> Path:
    """Write COCO's train2017, with rectangular polygons as instances; see `voc`."""
    images, annotations = [], []
    for place, boxes, image in _scenes(folder, count, folder / "train2017"):
        number = int(place.stem) + 1
        images.append(
            {
                "id": number,
                "file_name": place.name,
                "height": image.height,
                "width": image.width,
            }
        )
        for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            annotations.append(
                {
                    "id": OBJECTS * number + i,
                    "image_id": number,
                    "category_id": i + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
    categories = [{"id": i + 1, "name": f"thing {i + 1}"} for i in range(80)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    _text(folder / "annotations" / "instances_train2017.json", text)
    return folder


def cityscapes(folder: Path, count: int) -> Path:
    """Write Cityscapes' leftImg8bit and gtFine, train, at full size; see `voc`."""
    for place, _, scene in _scenes(folder, count, folder / "photographs"):
        large = scene.resize(CITY)
        mask = Image.fromarray(_mask(_boxes(large, int(place.stem)), large, lambda i: 24 + i, 7))
        for kind, image, ending in (
            ("leftImg8bit", large, "leftImg8bit"),
            ("gtFine", mask, "gtFine_labelIds"),
        ):
            target = folder / kind / "train" / "town"
            target.mkdir(parents=True, exist_ok=True)
            image.save(target / f"town_{int(place.stem):06}_000000_{ending}.png")
    return folder


def _scenes(folder: Path, count: int, target: Path) -> list[tuple[Path, Boxes, Image.Image]]:
    """Copy photographs to `target`; return their paths, random boxes inside them, and pixels."""
    target.mkdir(parents=True)
    scenes = []
    for source in sorted(photographs(folder, count).rglob("*.jpg")):
        place = target / source.name
        shutil.copy(source, place)
        with Image.open(place) as image:
            image.load()
        scenes.append((place, _boxes(image, int(place.stem)), image))
    return scenes


def _boxes(image: Image.Image, seed: int) -> Boxes:
    rng = np.random.default_rng(seed)
    size = np.array(image.size)
    extent = (size * rng.uniform(0.15, 0.5, (OBJECTS, 2))).astype(np.int64)
    corner = (rng.random((OBJECTS, 2)) * (size - extent)).astype(np.int64)
    return np.concatenate([corner, corner + extent], axis=1)


def _mask(
    boxes: Boxes, image: Image.Image, label: Callable[[int], int], background: int
) -> npt.NDArray[np.uint8]:
    mask = np.full((image.height, image.width), background, np.uint8)
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        mask[y0:y1, x0:x1] = label(i)
    return mask


def _xml(name: str, size: str, objects: str) -> str:
    return (
        f"<annotation><filename>{name}</filename><size>{size}</size>"
        f"<segmented>0</segmented>{objects}</annotation>\n"
    )


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
