"""Classification data sets in their published layouts, each as a tiny directory tree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from pipelines.beton.reader import Beton
from pipelines.conversion.convert import write_beton
from pipelines.datasets.files import IndexFormatError
from pipelines.datasets.imagenet import imagenet_subset, imagenet_val
from pipelines.datasets.images import open_images
from pipelines.datasets.inaturalist import inaturalist
from pipelines.datasets.index import SampleIndex
from pipelines.datasets.voc_classification import VOC_CLASSES, voc2007
from pipelines.engines.folder import FolderSource
from pipelines.imaging.torchvision_decode import decode
from pipelines.spec import CenterCrop, LoaderSpec, Shard
from rotpred.protocols.multilabel import read_labels
from tests.support.images import save_jpeg, smooth_image

pytestmark = pytest.mark.timeout(60)


def images(root: Path, *names: str) -> None:
    """JPEG files. Their brightness encodes their position in `names`."""
    for i, name in enumerate(names):
        image = smooth_image(0, 8, 8).point(lambda _, level=20 * i + 10: level)
        save_jpeg(root / name, image)


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(index: SampleIndex) -> list[str]:
    return [index.name(i) for i in range(len(index))]


VAL = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 5)]


def kit(root: Path, truth: str) -> Path:
    """A development kit whose ids do not follow the order of its synsets, with one group."""
    rows = [(1, "n02119789", 0), (2, "n01440764", 0), (3, "n15075141", 0), (4, "n00001740", 3)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    folder = root / "ILSVRC2012_devkit_t12"
    text(folder / "data/ILSVRC2012_validation_ground_truth.txt", truth)
    savemat(folder / "data/meta.mat", {"synsets": np.array(rows, fields)})
    return folder


def test_imagenet_lists(tmp_path: Path) -> None:
    for folder, files in (("train/n01440764", ["n01440764_10026.JPEG"]), ("val", VAL[:2])):
        images(tmp_path / folder, *files)
    train = text(tmp_path / "meta/train.txt", "n01440764/n01440764_10026.JPEG 0\n")
    val = text(tmp_path / "meta/val.txt", f"{VAL[0]} 65\n{VAL[1]} 970\n")
    index = open_images(str(train), root=tmp_path / "train")
    assert index.labels.tolist() == [0] and index.read(0)[:2] == b"\xff\xd8"
    index = open_images(str(val), root=tmp_path / "val")
    assert index.labels.tolist() == [65, 970] and index.read(1)[:2] == b"\xff\xd8"


def test_imagenet_val_by_synsets_and_by_the_development_kit(tmp_path: Path) -> None:
    images(tmp_path / "val", *VAL)
    text(tmp_path / "val/readme.txt", "no image")
    synsets = ["n15075141", "n01440764", "n02119789", "n01440764"]
    listed = imagenet_val(tmp_path / "val", truth=text(tmp_path / "s.txt", "\n".join(synsets)))
    by_id = imagenet_val(tmp_path / "val", truth=kit(tmp_path, "3\n2\n1\n2\n"))
    for index in (listed, by_id):
        assert names(index) == VAL and index.classes == ("n01440764", "n02119789", "n15075141")
        assert [index.classes[label] for label in index.labels] == synsets
        assert index.read(2) == (tmp_path / "val" / VAL[2]).read_bytes()


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ("n01440764\nn01440764\n0\nn01440764\n", r"s\.txt:3: expected a synset"),
        ("n01440764\n", r"s\.txt: 1 labels for 4 files"),
        ("", r"s\.txt: is empty"),
    ],
)
def test_a_wrong_truth_is_named(tmp_path: Path, truth: str, words: str) -> None:
    images(tmp_path / "val", *VAL)
    with pytest.raises(IndexFormatError, match=words):
        imagenet_val(tmp_path / "val", truth=text(tmp_path / "s.txt", truth))


def test_missing_pieces_of_imagenet_val_are_named(tmp_path: Path) -> None:
    images(tmp_path / "val", *VAL)
    with pytest.raises(IndexFormatError, match=r"truth\.txt:2: .*found '4'"):
        imagenet_val(tmp_path / "val", truth=kit(tmp_path, "3\n4\n1\n2\n"))  # a group, not a class
    (tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"no matrix" * 30)
    with pytest.raises(IndexFormatError, match=r"meta\.mat: not a table of synsets"):
        imagenet_val(tmp_path / "val", truth=tmp_path / "ILSVRC2012_devkit_t12")
    (tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"meta\.mat"):
        imagenet_val(tmp_path / "val", truth=tmp_path / "ILSVRC2012_devkit_t12")
    (tmp_path / "val" / VAL[1]).unlink()
    truth = text(tmp_path / "s.txt", "n01440764\n" * 3)
    with pytest.raises(IndexFormatError, match=r"_00000002\.JPEG, found .*3"):
        imagenet_val(tmp_path / "val", truth=truth)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        imagenet_val(tmp_path / "none", truth=truth)


def test_imagenet_subset(tmp_path: Path) -> None:
    files = [f"{s}/{s}_{i}.JPEG" for s in ("n01440764", "n02119789") for i in (3, 10026, 7)]
    images(tmp_path / "train", *files)
    index = SampleIndex.from_folder(tmp_path / "train")
    listing = text(tmp_path / "1percent.txt", "n02119789_7.JPEG\nn01440764_10026.JPEG\n")
    part = imagenet_subset(listing, index)
    assert names(part) == ["n02119789/n02119789_7.JPEG", "n01440764/n01440764_10026.JPEG"]
    assert part.labels.tolist() == [1, 0] and part.classes == index.classes
    again = open_images(f"imagenet-subset:{listing}", root=tmp_path / "train")
    assert again.labels.tolist() == [1, 0]
    for content, words in (
        ("n01440764_3.JPEG\nn01440764_4.JPEG\n", r"p\.txt:2: no image 'n01440764_4\.JPEG'"),
        ("n01440764_3.JPEG\n\nn01440764_3.JPEG\n", r"p\.txt:3: .* is listed twice"),
    ):
        with pytest.raises(IndexFormatError, match=words):
            imagenet_subset(text(tmp_path / "p.txt", content), index)
    images(tmp_path / "train", "n02119789/n01440764_3.JPEG")
    with pytest.raises(IndexFormatError, match="have the same name"):
        listing = text(tmp_path / "p.txt", "n01440764_3.JPEG\n")
        imagenet_subset(listing, SampleIndex.from_folder(tmp_path / "train"))


def coco(**changes: Any) -> dict[str, Any]:
    files = ["Plantae/1/b.jpg", "Aves/0/a.jpg", "Plantae/1/c.jpg"]
    content: dict[str, Any] = {
        "images": [
            {"id": 90 + i, "file_name": f"train_val2018/{name}"} for i, name in enumerate(files)
        ],
        "annotations": [
            {"id": 5, "image_id": 92, "category_id": 1},
            {"id": 6, "image_id": 90, "category_id": 1},
            {"id": 7, "image_id": 91, "category_id": 0},
        ],
        "categories": [{"id": 1, "name": "1"}, {"id": 0, "name": "0"}],
    }
    return {**content, **changes}


@pytest.mark.parametrize("place", ["", "train_val2018"])
@pytest.mark.parametrize("root", ["", "train_val2018"])
def test_inaturalist_whichever_folder_is_given(tmp_path: Path, place: str, root: str) -> None:
    files = ["Plantae/1/b.jpg", "Aves/0/a.jpg", "Plantae/1/c.jpg"]
    images(tmp_path / place / "train_val2018", *files)
    source = text(tmp_path / "train2018.json", json.dumps(coco()))
    index = inaturalist(source, root=tmp_path / root)
    assert index.labels.tolist() == [1, 0, 1] and index.classes == ("0", "1")
    assert all(index.name(i).endswith(name) for i, name in enumerate(files))
    for i, name in enumerate(files):
        assert index.read(i) == (tmp_path / place / "train_val2018" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": []}, "expected one annotation per image: image id 90"),
        ({"annotations": [{"image_id": 90, "category_id": 0}] * 3}, "one annotation per image"),
        ({"categories": [{"id": 1, "name": "x"}]}, r"category ids are not 0\.\.0"),
        ({"categories": [{"id": 0, "name": "x"}]}, "no category 1"),
        ({"categories": None}, "expected images, annotations and categories: TypeError"),
        ({"images": [{"id": 1}]}, "expected images, .*: KeyError 'file_name'"),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    source = text(tmp_path / "val2018.json", json.dumps(coco(**changes)))
    with pytest.raises(IndexFormatError, match=rf"val2018\.json: .*{words}"):
        inaturalist(source, root=tmp_path)


def test_missing_inaturalist_is_named(tmp_path: Path) -> None:
    source = text(tmp_path / "val2018.json", json.dumps(coco()))
    with pytest.raises(FileNotFoundError, match=r"'train_val2018/Plantae/1/b\.jpg' is not below"):
        inaturalist(source, root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train2018\.json"):
        inaturalist(tmp_path / "train2018.json", root=tmp_path)
    with pytest.raises(IndexFormatError, match=r"val2018\.json: not valid JSON"):
        inaturalist(text(source, "{"), root=tmp_path)
    escape = coco(images=[{"id": 90, "file_name": "../secret.jpg"}])
    escape["annotations"] = [{"image_id": 90, "category_id": 0}]
    images(tmp_path, "secret.jpg")
    (tmp_path / "data").mkdir()
    with pytest.raises(IndexFormatError, match="leads outside"):
        inaturalist(text(source, json.dumps(escape)), root=tmp_path / "data")


def test_places205(tmp_path: Path) -> None:
    base = tmp_path / "data/vision/torralba/deeplearning/images256"
    images(base, "a/abbey/gsun_1.jpg", "y/yard/two words.jpg")
    split = text(
        tmp_path / "trainvalsplit_places205/val_places205.csv",
        "a/abbey/gsun_1.jpg 0\ny/yard/two words.jpg 204\n",
    )
    index = open_images(str(split), root=base)
    assert index.labels.tolist() == [0, 204] and len(index.classes) == 205
    assert index.read(1) == (base / "y/yard/two words.jpg").read_bytes()


def voc(root: Path) -> Path:
    """Three images; person: present, difficult, absent; car: absent, present, present."""
    base = root / "VOCdevkit/VOC2007"
    images(base / "JPEGImages", "000005.jpg", "000007.jpg", "000009.jpg")
    for name in VOC_CLASSES:
        values = {"person": (1, 0, -1), "car": (-1, 1, 1)}.get(name, (-1, -1, -1))
        lines = [
            f"{p} {v:2}\n" for p, v in zip(("000005", "000007", "000009"), values, strict=True)
        ]
        text(base / f"ImageSets/Main/{name}_trainval.txt", "".join(lines))
    return base


def test_voc2007(tmp_path: Path) -> None:
    base = voc(tmp_path)
    found = voc2007(base, split="trainval")
    assert names(found.images) == [f"JPEGImages/00000{i}.jpg" for i in (5, 7, 9)]
    assert found.targets.dtype == np.int8 and found.targets.shape == (3, 20)
    assert found.classes == tuple(sorted(VOC_CLASSES)) and len(set(VOC_CLASSES)) == 20
    assert found.targets[:, found.classes.index("person")].tolist() == [1, 0, -1]
    assert found.targets[:, found.classes.index("car")].tolist() == [-1, 1, 1]
    assert (found.targets == -1).sum() == 60 - 4
    assert found.images.labels.tolist() == [-1] * 3
    assert open_images("voc2007:trainval", root=base).name(2) == "JPEGImages/000009.jpg"


def test_missing_pieces_of_voc2007_are_named(tmp_path: Path) -> None:
    base = voc(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"aeroplane_test\.txt"):
        voc2007(base, split="test")
    cat = base / "ImageSets/Main/cat_trainval.txt"
    good = cat.read_text()
    for content, words in (
        (good.replace("000007 -1", "000007  2"), r"cat_trainval\.txt:2: expected"),
        (good.replace("000007", "000008"), r"cat_trainval\.txt:2: '000008' is not the image"),
        (good + "000010 -1\n", r"cat_trainval\.txt:4: '000010' is not the image"),
        ("000005 -1\n", r"cat_trainval\.txt: 1 lines, expected 3"),
    ):
        with pytest.raises(IndexFormatError, match=words):
            text(cat, content)
            voc2007(base, split="trainval")
    text(cat, good)
    (base / "JPEGImages/000007.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"aeroplane_trainval\.txt:2: .*000007\.jpg"):
        voc2007(base, split="trainval")


def test_a_data_set_feeds_the_folder_engine_and_a_beton(tmp_path: Path) -> None:
    images(tmp_path / "val", *VAL)
    truth = text(tmp_path / "s.txt", "n02119789\nn01440764\nn01440764\nn02119789\n")
    source = open_images(f"imagenet-val:{truth}", root=tmp_path / "val")
    assert isinstance(source, SampleIndex)
    write_beton(source, tmp_path / "val.beton", workers=1)
    with Beton.open(tmp_path / "val.beton") as made:
        assert made.labels.tolist() == [1, 0, 0, 1] and made.classes == ("n01440764", "n02119789")
        stored = decode(made.payload(3))
    assert torch.equal(stored, decode(source.read(3)))
    spec = LoaderSpec(
        batch_size=4, crop=CenterCrop(8, None), flip=False, shuffle=False, engine="folder"
    )
    engine = FolderSource(source, spec, shard=Shard(), workers=1, pin=False)
    try:
        batch = next(iter(engine.epoch(0)))
        assert batch.labels.tolist() == [1, 0, 0, 1]
        assert isinstance(batch.images, torch.Tensor)
        levels = batch.images.float().mean((1, 2, 3))
        assert torch.allclose(levels, torch.tensor([10.0, 30, 50, 70]), atol=3)
    finally:
        engine.close()


def test_a_data_set_without_a_root_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a root"):
        open_images("inaturalist:train2018.json")


@pytest.mark.timeout(120)
def test_voc2007_is_converted_with_its_labels(tmp_path: Path) -> None:
    base, out = voc(tmp_path), tmp_path / "trainval.beton"
    script = Path(__file__).parents[3] / "scripts/to_beton.py"
    command = [sys.executable, script, "--input", "voc2007:trainval", "--root", base]
    (tmp_path / ".trainval.labels.npy.4194305.tmp").touch()  # of a conversion that was killed
    subprocess.run([*command, "--output", out, "--workers", "1"], check=True, timeout=100)
    left = {path.name for path in tmp_path.iterdir() if "trainval." in path.name}
    names = ("trainval.beton", "trainval.beton.json", "trainval.beton.segments")
    assert left == {*names, "trainval.labels.npy"}
    targets = np.load(tmp_path / "trainval.labels.npy")
    assert np.array_equal(targets, voc2007(base, split="trainval").targets)
    total = len(targets)
    for path, root in (
        (str(tmp_path / "trainval.labels.npy"), ""),
        ("voc2007:trainval", str(base)),
    ):
        assert np.array_equal(read_labels(path, total=total, root=root), targets)
    with pytest.raises(ValueError, match="the folder VOC2007"):
        read_labels("voc2007:trainval", total=total)


@pytest.mark.timeout(120)
def test_voc2007_is_converted_whole_or_not_at_all(tmp_path: Path) -> None:
    """An unusable image would shift all later rows: neither file is written."""
    base, out = voc(tmp_path), tmp_path / "out" / "trainval.beton"
    (base / voc2007(base, split="trainval").images.name(1)).write_bytes(b"no image")
    script = Path(__file__).parents[3] / "scripts/to_beton.py"
    command = [sys.executable, script, "--input", "voc2007:trainval", "--output", out]
    for options, words in (
        (["--root", base, "--workers", "1"], "the budget is 0"),
        (["--root", base, "--budget", "3"], "--budget is not for voc2007"),
        ([], "needs --root"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and words in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert not [p.name for p in out.parent.glob("*") if p.suffix in (".beton", ".npy")]
