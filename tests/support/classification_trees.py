"""Tiny classification data sets in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tests.support.images import save_jpeg, smooth_image

SYNSETS = ("n01440764", "n02119789", "n15075141", "n03000134")
PER_CLASS = 6
VAL = 10


class Tree(NamedTuple):
    """Data options of a recipe, and the true classes of its validation images."""

    train: str
    train_root: str | None
    val: str
    val_root: str
    truth: list[int]
    """Class ids of the validation images, in order."""


Trees = dict[str, Tree]
"""By name of the recipe."""


def make_trees(base: Path) -> Trees:
    """Four classes, each a color pattern of varying brightness, in four layouts."""
    truth = [(7 * i + 1) % 4 for i in range(VAL)]
    folders, lists = _imagenet(base / "imagenet", truth)
    places = _places(base / "places", truth)
    return {
        "in1k_linear": folders,
        "in1k_mhead": lists,
        "inat18_mhead": _inat(base / "inat", truth),
        "places205_mhead": places,
        "places205_mhead_vissl": places,
        "in1k_semi_1": folders._replace(
            train=f"imagenet-subset:{_subset(base)}", train_root=folders.train
        ),
    }


def _image(path: Path, label: int, number: int) -> None:
    image = smooth_image(label, 40 + number % 5, 44 + number % 7)
    save_jpeg(path, image.point(lambda v: (v * (8 + number % 5)) // 14))


def _write(path: Path, lines: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def _imagenet(base: Path, truth: list[int]) -> tuple[Tree, Tree]:
    listed = []
    for label, synset in enumerate(sorted(SYNSETS)):
        for i in range(PER_CLASS):
            name = f"{synset}/{synset}_{i}.JPEG"
            _image(base / "train" / name, label, i)
            listed.append(f"{name} {label}")
    names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, VAL + 1)]
    for i, (name, label) in enumerate(zip(names, truth, strict=True)):
        _image(base / "val" / name, label, i + 3)
    synsets = _write(base / "truth.txt", [sorted(SYNSETS)[label] for label in truth])
    train, val = str(base / "train"), str(base / "val")
    pairs = [f"{name} {label}" for name, label in zip(names, truth, strict=True)]
    return (
        Tree(train, None, f"imagenet-val:{synsets}", val, truth),
        Tree(
            *(_write(base / "meta/train.txt", listed), train),
            *(_write(base / "meta/val.txt", pairs), val),
            truth,
        ),
    )


def _subset(base: Path) -> str:
    """Two images of each class, listed by file name alone, as in SimCLR's lists."""
    names = [f"{synset}_{i}.JPEG" for i in (4, 1) for synset in SYNSETS]
    return _write(base / "percent.txt", names)


def _inat(base: Path, truth: list[int]) -> Tree:
    def split(part: str, labels: list[int]) -> str:
        names = [f"train_val2018/Aves/{label}/{part}{i}.jpg" for i, label in enumerate(labels)]
        for i, (name, label) in enumerate(zip(names, labels, strict=True)):
            _image(base / name, label, i)
        content = {
            "images": [{"id": 90 + i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [
                {"image_id": 90 + i, "category_id": label} for i, label in enumerate(labels)
            ],
            "categories": [{"id": i, "name": f"bird {i}"} for i in range(4)],
        }
        path = base / f"{part}2018.json"
        path.write_text(json.dumps(content))
        return f"inaturalist:{path}"

    train = split("train", [i % 4 for i in range(4 * PER_CLASS)])
    return Tree(train, str(base), split("val", truth), str(base), truth)


def _places(base: Path, truth: list[int]) -> Tree:
    root = base / "data/vision/torralba/deeplearning/images256"
    scenes = ("a/abbey", "a/airport_terminal", "b/bar", "y/yard")

    def split(part: str, labels: list[int]) -> str:
        lines = []
        for i, label in enumerate(labels):
            name = f"{scenes[label]}/gsun_{part}{i}.jpg"
            _image(root / name, label, i)
            lines.append(f"{name} {label}")
        return _write(base / f"trainvalsplit_places205/{part}_places205.csv", lines)

    train = split("train", [i % 4 for i in range(4 * PER_CLASS)])
    return Tree(train, str(root), split("val", truth), str(root), truth)
