"""The VOC and Cityscapes parsers: boxes and masks against the pixels, refused files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import cityscapes, voc
from pipelines.datasets.annotations import AnnotationErrors
from pipelines.datasets.voc_classification import VOC_CLASSES
from pipelines.dense.samples import open_dense_samples
from pipelines.dense.spec import DenseSpec
from pipelines.imaging.decode import ImageError, image_size, read_label_png
from tests.support import dense_trees
from tests.support.dense_trees import VOC_USED, check_box, colored
from tests.support.images import save_jpeg, smooth_image

pytestmark = pytest.mark.timeout(60)

N = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets. Tests only read them."""
    folder = tmp_path_factory.mktemp("dense")
    for write_tree in (dense_trees.voc, dense_trees.voc_masks):
        write_tree(folder, N)
    dense_trees.cityscapes(folder, N)
    return folder


def test_voc_boxes_lie_on_the_objects(base: Path) -> None:
    root = base / "VOCdevkit"
    spec = DenseSpec(root=str(root))
    samples = open_dense_samples(spec)
    assert len(samples) == 2 * N and samples.classes == VOC_CLASSES
    assert samples.names[0] == "000000" and samples.names[N] == "2008_000000"
    flags = []
    for i in range(len(samples)):
        objects = samples.objects(i)
        with Image.open(samples.path(i)) as image:
            assert tuple(samples.sizes[i]) == image.size[::-1]
        for box, label in zip(objects.boxes, objects.labels, strict=True):
            check_box(colored(samples.path(i), VOC_USED.index(VOC_CLASSES[label])), box)
        flags += objects.difficult.tolist()
    assert flags == [i % 4 == 3 and k == 1 for i in [*range(N)] * 2 for k in range(2)]
    with pytest.raises(ValueError, match="no mask"):
        samples.mask(0)
    assert len(open_dense_samples(DenseSpec(root=str(root), max_samples=N + 1))) == N + 1
    ids = {
        open_dense_samples(DenseSpec(root=str(root), max_samples=n)).data_id
        for n in (None, 3, 4, 3)
    }
    assert len(ids) == 3


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two valid images with other classes, in the VOC layout without a year."""
    for stem in "ab":
        save_jpeg(tmp_path / f"zoo/JPEGImages/{stem}.jpeg", smooth_image(3, 40, 60))
        boxes, flags = [dense_trees.Box(0, 5, 6, 60, 40)], [False]
        lines = dense_trees.voc_xml(stem, (1, 1), boxes, flags)  # a wrong image size
        dense_trees.write(tmp_path / f"zoo/Annotations/{stem}.xml", lines)
    dense_trees.write(tmp_path / "zoo/ImageSets/Main/all.txt", ["a", "b"])
    return tmp_path


def edit(root: Path, old: str, new: str) -> None:
    path = root / "zoo/Annotations/b.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def read(root: Path, budget: int) -> tuple[object, list[str]]:
    errors = AnnotationErrors(budget)
    samples = voc.index_boxes("zoo/all", root, errors=errors, classes=("cat", "dog"))
    return samples, errors.found


def test_voc_own_classes_and_the_images_own_size(own: Path) -> None:
    spec = DenseSpec(data="voc:zoo/all", root=str(own), classes=("cat", "dog"))
    samples = open_dense_samples(spec)
    assert samples.names == ("a", "b") and samples.sizes.tolist() == [[40, 60], [40, 60]]
    assert samples.objects(1).labels.tolist() == [1]
    assert samples.objects(1).boxes.tolist() == [[5, 6, 60, 40]]


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("<name>dog", "<name>emu", 5, "class 'emu' is none of the 2 classes"),
        ("<xmax>60", "<xmax>62", 8, "the box 5,6 to 62,40 leaves the image of 60x40 pixels"),
        ("<xmin>6", "<xmin>-1", 8, "leaves the image"),
        ("<xmax>60", "<xmax>5", 8, "the box 5,6 to 5,40 has no area"),
        ("<ymax>40", "<ymax>forty", 9, "expected a number in <ymax>, found 'forty'"),
        ("<ymax>40", "<ymax>nan", 8, "is not finite"),
        ("<xmax>60</xmax>", "", 4, "expected a number in <xmax>, found ''"),
        ("<difficult>0", "<difficult>no", 7, "expected 0 or 1 in <difficult>"),
    ],
)
def test_a_wrong_object_is_left_out_and_named(
    own: Path, old: str, new: str, line: int, what: str
) -> None:
    edit(own, old, new)
    path = own / "zoo/Annotations/b.xml"
    samples, found = read(own, 1)
    assert len(found) == 1 and found[0].startswith(f"{path}:{line}: ") and what in found[0]
    assert len(samples.objects(1).labels) == 0 and len(samples.objects(0).labels) == 1  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError,
        match=f"1 wrong annotations, max_invalid_annotations is 0: {re.escape(found[0])}",
    ):
        read(own, 0)


def test_a_pixel_beyond_the_border_is_cut_off(own: Path) -> None:
    edit(own, "<xmax>60", "<xmax>61")
    edit(own, "<ymin>7", "<ymin>0")
    samples, found = read(own, 0)
    assert not found
    assert samples.objects(1).boxes.tolist() == [[5, 0, 60, 40]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("</object>", "</objekt>", ":10", "not valid XML: mismatched tag"),
        ("<annotation>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>", ":1", "document type"),
        ("annotation>", "svg>", ":1", "<svg> where <annotation> was expected"),
    ],
)
def test_a_wrong_annotation_file(own: Path, old: str, new: str, where: str, what: str) -> None:
    edit(own, old, new)
    samples, found = read(own, 1)
    assert len(found) == 1 and found[0].startswith(f"{own / 'zoo/Annotations/b.xml'}{where}: ")
    assert what in found[0] and samples.names == ("a",)  # type: ignore[attr-defined]


def test_missing_and_broken_files(own: Path) -> None:
    listed = own / "zoo/ImageSets/Main/all.txt"
    dense_trees.write(listed, ["a", "b", "c"])
    (own / "zoo/Annotations/a.xml").unlink()
    (own / "zoo/JPEGImages/x.jpg").write_bytes(b"GIF89a")
    samples, found = read(own, 2)
    assert samples.names == ("b",)  # type: ignore[attr-defined]
    assert found[0] == f"{own / 'zoo/Annotations/a.xml'}:0: No such file or directory"
    assert found[1] == f"{listed}:3: {own / 'zoo/JPEGImages/c'}: no such image"
    (own / "zoo/JPEGImages/b.jpeg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="zoo/all: no image is left"):
        read(own, 3)
    for lines, what in (
        (["a", "../b"], r"all.txt:2: expected an image's name, found '../b'"),
        (["a", "b  1"], r"all.txt:2: expected an image's name, found 'b  1'"),
        (["a", "", "a"], r"all.txt:3: 'a' is listed twice, first in .*all.txt:1"),
    ):
        dense_trees.write(listed, lines)
        with pytest.raises(ValueError, match=what):
            read(own, 9)
    for data, what in (
        ("voc:zoo", "expected DIR/LIST"),
        ("voc:zoo/none", "none.txt' does not exist"),
        ("zip:zoo", "data 'zip:zoo': expected voc:DIR/LIST"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=what):
            open_dense_samples(DenseSpec(data=data, root=str(own)))


def test_sizes_of_headers_are_those_of_upright_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    # Metadata that push the frame header beyond the part that is read first.
    save_jpeg(tmp_path / "a.jpg", smooth_image(1, 30, 50), exif=exif, comment=b"c" * 60_000)
    save_jpeg(tmp_path / "b.jpg", smooth_image(1, 30, 50), exif=exif, icc_profile=bytes(150_000))
    assert [image_size(str(tmp_path / name)) for name in ("a.jpg", "b.jpg")] == [(50, 30)] * 2
    for name in ("c.png", "d.webp", "e.bmp"):
        smooth_image(1, 30, 50).save(tmp_path / name)
        assert image_size(str(tmp_path / name)) == (30, 50)
    (tmp_path / "f.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ImageError):
        image_size(str(tmp_path / "f.jpg"))


@pytest.mark.parametrize("read", [image_size, read_label_png])
def test_pixels_beyond_pillows_limit_are_an_image_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], object]
) -> None:
    """Pillow warns above its limit, and the warning is an error."""
    Image.new("L", (15, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="more pixels than the limit"):
        read(str(tmp_path / "a.png"))


def test_voc_masks(base: Path) -> None:
    root = str(base / "VOCdevkit")
    plain = open_dense_samples(DenseSpec(data="vocseg:2012/train", root=root))
    assert plain.classes[:2] == ("background", "aeroplane") and len(plain.classes) == 21
    both = open_dense_samples(DenseSpec(data="vocseg:2012/train+2012/aug", root=root))
    lone = open_dense_samples(DenseSpec(data="vocseg:2012/train_aug", root=root))
    assert both.names == lone.names and len(both) == 2 * N
    for i in range(len(both)):
        mask = both.mask(i)
        assert mask.dtype == np.uint8 and mask.shape == tuple(both.sizes[i])
        ids = set(np.unique(mask)) - {0, 255}
        assert ids and (i >= N or 255 in mask) and (i < N or 255 not in mask)
        for number in ids:  # nearly all pixels of a class have its color, and vice versa
            there = colored(both.path(i), VOC_USED.index(both.classes[number]))
            assert there[mask == number].all() and (mask[there] == number).mean() > 0.8
        assert np.array_equal(lone.mask(i) == 255, mask == 255) is (i >= N)
    with pytest.raises(ValueError, match="no objects"):
        both.objects(0)


def test_damaged_masks_are_named(tmp_path: Path) -> None:
    root = dense_trees.voc_masks(tmp_path, 2)
    spec = DenseSpec(data="vocseg:2012/val", root=str(root), max_invalid_annotations=1)
    folder = root / "VOC2012/SegmentationClass"
    first, second = (folder / f"{name}.png" for name in open_dense_samples(spec).names)
    for mask, what in (
        (np.full((96, 128), 21, np.uint8), "pixels of the number 21, which is none of the 21"),
        (np.zeros((96, 127), np.uint8), "127x96 pixels, the image has 128x96"),
        (np.zeros((96, 128, 3), np.uint8), "pixels of mode RGB"),
    ):
        Image.fromarray(mask).save(first)
        with pytest.raises(ImageError, match=f"^{re.escape(str(first))}: .*{what}"):
            open_dense_samples(spec).mask(0)
    first.write_bytes(second.read_bytes()[:60])
    with pytest.raises(ImageError, match=f"^{re.escape(str(first))}: "):
        open_dense_samples(spec).mask(0)
    second.unlink()
    assert len(open_dense_samples(spec)) == 1
    with pytest.raises(ValueError, match=r"val.txt:2: .*does not exist"):
        open_dense_samples(DenseSpec(data=spec.data, root=spec.root))


def test_cityscapes_train_ids(base: Path) -> None:
    samples = open_dense_samples(DenseSpec(data="cityscapes:val", root=str(base / "cityscapes")))
    assert len(samples) == N and samples.names[0] == "frankfurt_000000_000019"
    for i in range(N):
        raw_path = next((base / "cityscapes/gtFine/val").glob(f"*/{samples.names[i]}*"))
        raw, mask = np.asarray(Image.open(raw_path)), samples.mask(i)
        assert (mask[raw == dense_trees.SKY] == samples.classes.index("sky")).all()
        assert (mask[raw == dense_trees.CAR] == samples.classes.index("car")).all()
        assert (mask[raw == dense_trees.ROAD] == samples.classes.index("road")).all()
        assert (mask[-3:] == 255).all() and (mask[:4, :4] == 255).all()
    assert len(cityscapes.LABEL_IDS) == len(cityscapes.CITYSCAPES_CLASSES) == 19


def test_cityscapes_without_a_mask(tmp_path: Path) -> None:
    root = dense_trees.cityscapes(tmp_path, 2)
    next((root / "gtFine/val").glob("*/lindau*")).unlink()
    errors = AnnotationErrors(1)
    assert len(cityscapes.index_masks("val", root, errors=errors)) == 1
    assert "lindau_000001_000019_leftImg8bit.png: no mask" in errors.found[0]
    with pytest.raises(FileNotFoundError, match="leftImg8bit/test' is not a folder"):
        cityscapes.index_masks("test", root, errors=errors)
