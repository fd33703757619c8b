"""The interface of data sets: files, betons (also of raw pixels) and images in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.beton.layout import RAW
from pipelines.beton.reader import Beton
from pipelines.conversion.convert import write_beton
from pipelines.datasets.images import MemoryImages
from pipelines.engines.folder import FolderSource
from pipelines.imaging.decode import ImageError
from pipelines.imaging.torchvision_decode import decode
from pipelines.samples import Samples, open_samples
from pipelines.spec import LoaderSpec, Resize, Shard

PIXELS = [np.random.default_rng(i).integers(0, 256, (9 + i, 12, 3), np.uint8) for i in range(5)]
LABELS = np.array([0, 1, 1, 0, 2])


def in_memory() -> MemoryImages:
    return MemoryImages(PIXELS.__getitem__, LABELS, ("a", "b", "c"))


@pytest.fixture
def kinds(tmp_path: Path) -> Iterator[dict[str, Samples]]:
    """The same five images: JPEG files, a beton of them, and their pixels, raw and in memory."""
    write_beton(in_memory(), tmp_path / "x.beton", workers=1)
    with Beton.open(tmp_path / "x.beton") as beton:
        for i, label in enumerate(LABELS):
            file = tmp_path / "x" / "abc"[label] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(beton.read(i)))
        sizes = np.array([image.nbytes for image in PIXELS], np.uint64)
        raw = replace(
            beton,
            data=np.concatenate([image.reshape(-1) for image in PIXELS]),
            offsets=np.cumsum(sizes) - sizes,
            sizes=sizes,
            modes=np.full(len(PIXELS), RAW, np.uint8),
        )
        yield {
            "files": open_samples(str(tmp_path / "x")),
            "beton": open_samples(str(tmp_path / "x.beton")),
            "raw": raw,
            "memory": in_memory(),
        }


def test_each_kind_reads_names_and_describes_its_samples(kinds: dict[str, Samples]) -> None:
    for kind, samples in kinds.items():
        assert len(samples) == 5 and samples.classes == ("a", "b", "c")
        assert sorted(samples.labels.tolist()) == sorted(LABELS.tolist())
        assert len(samples.fingerprint) == 16 and samples.fingerprint == samples.fingerprint
        assert samples.describe()["samples"] == 5
        assert (samples.beton is None) == (kind in ("files", "memory"))
        for i in range(5):
            image = samples.read(i)
            assert str(i) in samples.name(i) or kind == "files"
            assert samples.location(i).endswith(samples.name(i))
            assert not Path(samples.name(i)).is_absolute()
            if kind in ("raw", "memory"):
                assert isinstance(image, np.ndarray) and np.array_equal(image, PIXELS[i])
            else:
                assert bytes(image)[:2] == b"\xff\xd8" and samples.size(i) == len(image)
        samples.close()
        samples.close()  # may be called twice
    assert kinds["raw"].beton is not None and kinds["raw"].beton.raw
    assert kinds["beton"].beton is not None and not kinds["beton"].beton.raw


def test_the_folder_engine_reads_each_kind(kinds: dict[str, Samples]) -> None:
    spec = LoaderSpec(batch_size=5, crop=Resize(8), flip=False, shuffle=False, drop_last=False)
    found = {}
    for kind, samples in kinds.items():
        source = FolderSource(samples, spec, shard=Shard(), workers=1, pin=False)
        (batch,) = list(source.epoch(0))
        source.close()
        assert batch.valid.all() and batch.labels.tolist() == samples.labels.tolist()
        found[kind] = batch.images.clone()
    assert torch.equal(found["raw"], found["memory"])
    order = torch.from_numpy(np.argsort(LABELS, kind="stable"))
    assert torch.equal(found["files"], found["beton"][order])
    assert (found["raw"].float() - found["beton"].float()).abs().mean() < 8


def test_a_beton_can_be_converted_again(kinds: dict[str, Samples], tmp_path: Path) -> None:
    """Streams are kept as they are; raw pixels become JPEG streams."""
    with Beton.open(tmp_path / "x.beton") as first:
        for kind, passed in (("beton", 5), ("raw", 0)):
            made = write_beton(kinds[kind], tmp_path / f"{kind}.beton", workers=1)
            assert made.passed == passed and made.classes == ("a", "b", "c")
            assert made.source["fingerprint"] == first.fingerprint
            with Beton.open(tmp_path / f"{kind}.beton") as second:
                for i in range(5):
                    assert torch.equal(decode(second.read(i)), decode(first.read(i)))


def test_a_fingerprint_in_memory_covers_pixels_sizes_labels_and_classes() -> None:
    others = [
        replace(in_memory(), labels=LABELS + 1),
        replace(in_memory(), get=lambda _: PIXELS[0]),
        replace(in_memory(), get=lambda i: PIXELS[i].reshape(12, -1, 3)),
        replace(in_memory(), classes=("a", "b", "d")),
        replace(in_memory(), get=lambda i: (b"1", b"12", b"", b"", b"")[i]),
        replace(in_memory(), get=lambda i: (b"11", b"2", b"", b"", b"")[i]),
    ]
    found = {data.fingerprint for data in (in_memory(), in_memory(), *others)}
    assert len(found) == 7


def test_what_another_library_cannot_read_is_an_image_error() -> None:
    def get(_: int) -> bytes:
        raise OSError(5, "Input/output error")

    broken = replace(in_memory(), get=get)
    with pytest.raises(ImageError, match=r"^Input/output error$"):
        broken.read(0)
    assert broken.size(0) == 0
