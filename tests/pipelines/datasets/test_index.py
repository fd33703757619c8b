"""The sample index: files, order and labels, compared with torchvision."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from pipelines.datasets.files import IndexFormatError
from pipelines.datasets.images import from_digits, from_torchvision, open_images
from pipelines.datasets.index import FINGERPRINT_FILES, SampleIndex
from pipelines.imaging.decode import ImageError

pytestmark = pytest.mark.timeout(60)


def put(path: Path, data: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        Image.new("RGB", (4, 4), (len(path.name), 0, 0)).save(path, "JPEG")
    else:
        path.write_bytes(data)
    return path


def names(index: SampleIndex) -> list[str]:
    return [index.name(i) for i in range(len(index))]


def test_folder_agrees_with_torchvision(tmp_path: Path) -> None:
    for name in (
        "b/1.jpg",
        "b/0.JPEG",
        "a/z/deep.png",
        "a/y.jpg",
        "A/x.webp",
        "10/q.bmp",
        "9/q.tif",
    ):
        put(tmp_path / name)
    put(tmp_path / "é" / "ü ö.jpg")
    index, reference = SampleIndex.from_folder(tmp_path), ImageFolder(str(tmp_path))
    assert list(index.classes) == reference.classes
    assert [(str(index.path(i)), int(index.labels[i])) for i in range(len(index))] == [
        (path, label) for path, label in reference.samples
    ]


def test_hidden_and_other_files_are_skipped_gif_is_not(tmp_path: Path) -> None:
    for name in ("a/x.GIF", "a/.hidden.jpg", "a/notes.txt", "a/.cache/y.jpg", ".git/z.jpg"):
        put(tmp_path / name)
    assert names(SampleIndex.from_folder(tmp_path)) == ["a/x.GIF"]


def test_empty_class_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a/x.jpg")
    (tmp_path / "b").mkdir()
    with pytest.raises(IndexFormatError, match="class 'b' has no images"):
        SampleIndex.from_folder(tmp_path)


def test_folders_without_classes_are_unlabelled(tmp_path: Path) -> None:
    put(tmp_path / "loose.jpg")
    put(tmp_path / "a/x.jpg")
    index = SampleIndex.from_folder(tmp_path)
    assert names(index) == ["loose.jpg", "a/x.jpg"]
    assert index.labels.tolist() == [-1, -1] and index.classes == ()
    (tmp_path / "loose.jpg").unlink()
    assert SampleIndex.from_folder(tmp_path).labels.tolist() == [0]
    assert SampleIndex.from_folder(tmp_path, labelled=False).labels.tolist() == [-1]


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexFormatError, match="no images"):
        SampleIndex.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        SampleIndex.from_folder(tmp_path / "none")
    put(tmp_path / "train/a/x.jpg")
    put(tmp_path / "val/a/x.jpg")
    with pytest.raises(IndexFormatError, match="give one of these"):
        SampleIndex.from_folder(tmp_path)


def test_links_outside_and_loops_are_refused(tmp_path: Path) -> None:
    root, other = tmp_path / "data", tmp_path / "other"
    put(other / "secret.jpg")
    put(root / "a/x.jpg")
    (root / "a/out.jpg").symlink_to(other / "secret.jpg")
    index = SampleIndex.from_folder(root)
    with pytest.raises(ImageError, match="outside"):
        index.read(names(index).index("a/out.jpg"))
    (root / "a/loop").symlink_to(root / "a")
    with pytest.raises(IndexFormatError, match="above itself"):
        SampleIndex.from_folder(root)
    (root / "a/loop").unlink()
    (root / "b").symlink_to(other)
    with pytest.raises(IndexFormatError, match="outside"):
        SampleIndex.from_folder(root)


def test_reading_names_the_path_that_is_not_a_regular_file(tmp_path: Path) -> None:
    put(tmp_path / "a/good.jpg")
    (tmp_path / "a/folder.jpg").mkdir()
    (tmp_path / "a/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    index = SampleIndex.from_folder(tmp_path)
    assert names(index) == ["a/folder.jpg", "a/gone.jpg", "a/good.jpg", "a/pipe.jpg"]
    for i, words in ((0, "a folder"), (1, "does not exist"), (3, "a pipe")):
        with pytest.raises(ImageError, match=words):
            index.read(i)
    assert index.read(2) == (tmp_path / "a/good.jpg").read_bytes()


def test_list_with_labels(tmp_path: Path) -> None:
    for name in ("img/a b.jpg", "img/other.jpg"):
        put(tmp_path / name)
    listing = put(tmp_path / "meta/train.txt", b"img/a b.jpg 3\n\nimg/other.jpg 0\n")
    index = SampleIndex.from_list(listing, root=tmp_path)
    assert names(index) == ["img/a b.jpg", "img/other.jpg"]
    assert index.labels.tolist() == [3, 0] and index.classes == ("0", "1", "2", "3")
    assert index.read(0)[:2] == b"\xff\xd8"


def test_list_without_labels(tmp_path: Path) -> None:
    for name in ("a b.jpg", "c.PNG"):
        put(tmp_path / name)
    listing = put(tmp_path / "l.txt", b"a b.jpg\nc.PNG\n")
    index = SampleIndex.from_list(listing)
    assert names(index) == ["a b.jpg", "c.PNG"] and index.labels.tolist() == [-1, -1]
    assert index.root == tmp_path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a.jpg 0\n../b.jpg 1\n", r"l\.txt:2: .*outside"),
        (b"a.jpg 0\n/etc/passwd 1\n", r"l\.txt:2: .*outside"),
        (b"a.jpg 0\nb.jpg one\n", r"l\.txt:2: expected"),
        (b"a.jpg 0\nb.jpg -1\n", r"l\.txt:2: expected"),
        (b"a.jpg 0\nb.jpg\n", r"l\.txt:2: has no label"),
        (b"a.jpg\nb.jpg 1\n", r"l\.txt:2: has a label"),
        (b"a.jpg 99999999999999999999\n", r"l\.txt:1: label"),
        (b"a.jpg 0\n\xff\xfe.jpg 1\n", r"l\.txt:2: not UTF-8"),
        (b"\n\n", r"l\.txt: is empty"),
    ],
)
def test_bad_lists_name_the_line(tmp_path: Path, text: bytes, words: str) -> None:
    with pytest.raises(IndexFormatError, match=words):
        SampleIndex.from_list(put(tmp_path / "l.txt", text))


@pytest.mark.parametrize("gone", ["a/1.jpg", "c/2.jpg"])
def test_a_list_that_names_a_missing_image_names_the_line(tmp_path: Path, gone: str) -> None:
    """The first of several, although folders are read one after the other."""
    for name in ("a/0.jpg", "b/1.jpg"):
        put(tmp_path / name)
    lines = f"a/0.jpg 0\n\nb/1.jpg 1\n \n{gone} 0\nb/7.jpg 2\na/8.jpg 2\n"
    with pytest.raises(FileNotFoundError, match=rf"l\.txt:5: '.*/{gone}' does not exist"):
        SampleIndex.from_list(put(tmp_path / "l.txt", lines.encode()))


def test_there_is_no_sample_beyond_the_ends(tmp_path: Path) -> None:
    for name in ("a/0.jpg", "b/1.jpg", "c/2.jpg"):
        put(tmp_path / name)
    index = SampleIndex.from_folder(tmp_path)
    for bad in (3, -1):
        with pytest.raises(IndexError):
            index.name(bad)


def test_a_million_paths_take_their_own_length_and_little_more(tmp_path: Path) -> None:
    count, line = 200_000, "n01440764/n01440764_%05d.JPEG 7\n"
    for i in range(1000):
        path = tmp_path / (line % i).split()[0]
        path.parent.mkdir(exist_ok=True)
        path.touch()
    listing = put(tmp_path / "l.txt", "".join(line % (i % 1000) for i in range(count)).encode())
    index = SampleIndex.from_list(listing)
    held = len(index.blob) + index.offsets.nbytes + index.labels.nbytes
    assert held / count < 64
    assert index.name(count - 1) == "n01440764/n01440764_00999.JPEG"


def test_other_images_under_the_same_names_are_other_data(tmp_path: Path) -> None:
    """The fingerprint depends on bytes and labels, not on file times or the folder."""
    for root, when in (("a", 1e9), ("b", 2e9)):
        for k in range(5):
            file = put(tmp_path / root / f"class{k % 2}" / f"{k}.jpg", bytes(100 + k))
            os.utime(file, (when, when))

    def of(root: str, *, labelled: bool = True) -> str:
        return SampleIndex.from_folder(tmp_path / root, labelled=labelled).fingerprint

    one = of("a")
    assert of("b") == one and len(one) == 16
    put(tmp_path / "b/class1/3.jpg", bytes(104))
    assert len({one, of("b"), of("a", labelled=False)}) == 3


def test_of_many_files_some_are_asked_for_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(SampleIndex, "size", lambda _, i: asked.append(i) or 7)
    for count, gaps in (
        (1, set()),
        (FINGERPRINT_FILES, {1}),
        (FINGERPRINT_FILES * 3 // 2, {1, 2}),
        (5 * FINGERPRINT_FILES, {5}),
    ):
        asked.clear()
        offsets = np.zeros(count + 1, np.int64)
        many = SampleIndex(Path(), b"", offsets, np.zeros(count, np.int64), ("a",))
        assert len(many.fingerprint) == 16
        assert len(asked) == min(count, FINGERPRINT_FILES) and asked[0] == 0
        assert set(np.diff(asked).tolist()) == gaps and asked[-1] < count


def test_digits_are_split_without_overlap() -> None:
    train, val = from_digits(split="train"), from_digits(split="val")
    assert (len(train), len(val)) == (1437, 360)
    pixels = val.read(0)
    assert isinstance(pixels, np.ndarray) and pixels.shape == (32, 32, 3) and pixels.max() > 200
    assert train.classes == tuple("0123456789")


def test_open_images_resolves_or_says_why(tmp_path: Path) -> None:
    put(tmp_path / "d/a/x.jpg")
    listing = put(tmp_path / "l.txt", b"d/a/x.jpg 5\n")
    assert open_images(str(tmp_path / "d")).labels.tolist() == [0]
    assert open_images(str(listing)).labels.tolist() == [5]
    assert open_images(str(listing), labelled=False).labels.tolist() == [-1]
    assert open_images("digits", labelled=False).classes == ()
    with pytest.raises(FileNotFoundError, match="not a folder"):
        open_images(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="expected one of"):
        open_images("torchvision:os")
    with pytest.raises(FileNotFoundError, match="cannot be opened"):
        from_torchvision("CIFAR10", root=tmp_path)


def test_a_list_in_a_folder_that_is_missing_too_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "list.txt"
    with pytest.raises(FileNotFoundError, match=rf"^list file '{missing}' does not exist$"):
        SampleIndex.from_list(missing)
