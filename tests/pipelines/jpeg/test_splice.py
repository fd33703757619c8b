"""Splicing: the small JPEG of a crop decodes to the pixels of the whole; damage is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.beton.reader import Beton
from pipelines.beton.segments import RECORD, Segments
from pipelines.beton.splicing import splice_batch
from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.imaging.decode import ImageError
from pipelines.jpeg.splice import MISMATCH, splice

Pixels = Any
SIZES = ((160, 240), (97, 64), (33, 250), (17, 17), (8, 8))


def photograph(height: int, width: int, which: int = 0) -> Image.Image:
    whole = Image.fromarray(load_sample_images().images[which])
    return whole.resize((width, height), Image.Resampling.BICUBIC)


def pillow_jpeg(image: Image.Image, subsampling: int | str, interval: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=subsampling, restart_marker_blocks=interval)
    return buffer.getvalue()


def opencv_jpeg(image: Image.Image, factors: int, interval: int) -> bytes:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factors, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    done, data = cv2.imencode(".jpg", np.asarray(image)[:, :, ::-1], options)
    assert done
    stream: bytes = data.tobytes()
    return stream


FORMATS: dict[str, tuple[int, int, Callable[[Image.Image, int], bytes]]] = {
    "4:4:4": (8, 8, lambda p, k: pillow_jpeg(p, 0, k)),
    "4:2:2": (16, 8, lambda p, k: pillow_jpeg(p, 1, k)),
    "4:2:0": (16, 16, lambda p, k: pillow_jpeg(p, 2, k)),
    "4:1:1": (32, 8, lambda p, k: opencv_jpeg(p, 0x411111, k)),
    "4:4:0": (8, 16, lambda p, k: opencv_jpeg(p, 0x121111, k)),
    "grey": (8, 8, lambda p, k: pillow_jpeg(p.convert("L"), 0, k)),
}
"""MCU width and height, and an encoder that writes restart markers every k MCUs."""


def index(data: bytes, mcu_width: int, mcu_height: int) -> tuple[Any, Any]:
    """Segment record and lengths of a stream with restart markers, by scanning every byte."""
    at, interval, frame, size = 2, 0, 0, (0, 0)
    while data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xC0:
            frame = at + 5
            size = tuple(int.from_bytes(data[frame + i : frame + i + 2], "big") for i in (0, 2))
        if data[at + 1] == 0xDD:
            interval = int.from_bytes(data[at + 4 : at + 6], "big")
        at += 2 + length
    head = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    begin, lengths = head, []
    for i in range(head, len(data) - 1):
        if data[i] == 0xFF and (0xD0 <= data[i + 1] <= 0xD7 or data[i + 1] == 0xD9):
            lengths.append(i - begin)
            begin = i + 2
    rows, columns = -(-size[0] // mcu_height), -(-size[1] // mcu_width)
    assert begin == len(data) and len(lengths) * interval == rows * columns
    record = np.zeros(1, RECORD)
    record[0] = (0, head, frame, interval, columns, rows, mcu_width, mcu_height)
    return record, np.array(lengths, np.uint16)


def by_pillow(data: bytes) -> Pixels:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def by_ffcv(data: bytes) -> Pixels:
    from pipelines.engines.ffcv import loader

    stream = np.frombuffer(data, np.uint8)
    width, height = Image.open(BytesIO(data)).size
    out = np.zeros((height, width, 3), np.uint8)
    code = loader.ctypes_imdecode(
        stream.ctypes.data, len(data), height, width, out.ctypes.data, height, width,
        0, 0, 1, 1, False, False,
    )  # fmt: skip
    assert code == 0  # not even a warning
    return out


def cut(pixels: Pixels, box: Any, y0: int = 0, x0: int = 0) -> Pixels:
    """The part of a box that lies inside the image whose corner is at (y0, x0)."""
    top, left, bottom, right = box[0] - y0, box[1] - x0, box[0] + box[2] - y0, box[1] + box[3] - x0
    return pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]


def some_boxes(draw: np.random.Generator, height: int, width: int, count: int) -> Any:
    """Boxes of any size and position; one in three exceeds the image."""
    for i in range(count):
        h, w = draw.integers(1, height + 1), draw.integers(1, width + 1)
        top, left = draw.integers(0, height - h + 1), draw.integers(0, width - w + 1)
        if i % 3 == 0:
            top, left, h = top - draw.integers(5), left + draw.integers(5), h + 3
        yield np.array([top, left, h, w, 0], np.int32)


@pytest.mark.parametrize("decoder", [by_pillow, pytest.param(by_ffcv, marks=pytest.mark.ffcv)])
@pytest.mark.parametrize("form", FORMATS)
def test_inside_the_crop_every_pixel_is_the_whole_images(
    form: str, decoder: Callable[[bytes], Pixels]
) -> None:
    draw = np.random.default_rng(3)
    mcu_width, mcu_height, encode = FORMATS[form]
    crops = cuts = 0
    for which, (height, width) in enumerate(SIZES):
        columns = -(-width // mcu_width)
        for interval in sorted({k for k in (1, 2, 3, columns) if columns % k == 0}):
            data = encode(photograph(height, width, which % 2), interval)
            record, lengths = index(data, mcu_width, mcu_height)
            stored, whole = np.frombuffer(data, np.uint8), decoder(data)
            for box in some_boxes(draw, height, width, 40):
                out = np.empty(len(data), np.uint8)
                written, y0, x0, h, w = splice(
                    stored, 0, len(data), record[0], lengths, height, width, box, out
                )
                small = decoder(out[:written].tobytes() if written else data)
                assert small.shape == (h, w, 3)
                assert np.array_equal(cut(small, box, y0, x0), cut(whole, box)), (box, interval)
                crops, cuts = crops + 1, cuts + (written > 0)
    assert crops >= 300 and cuts > crops / 4


def test_only_the_segments_under_the_crop_are_kept() -> None:
    data = pillow_jpeg(photograph(160, 240), 2, 1)
    record, lengths = index(data, 16, 16)
    out = np.empty(len(data), np.uint8)
    stored = np.frombuffer(data, np.uint8)
    # Rows 50..61 and columns 34..45 with two pixels around lie in one row and one column of MCUs.
    box = np.array([50, 34, 12, 12, 0], np.int32)
    written, *place = splice(stored, 0, len(data), record[0], lengths, 160, 240, box, out)
    assert place == [48, 32, 16, 16]
    assert written == record["head"][0] + lengths[3 * 15 + 2] + 2
    # One pixel more needs the chroma sample of the neighbour.
    box = np.array([49, 34, 12, 13, 0], np.int32)
    _, *place = splice(stored, 0, len(data), record[0], lengths, 160, 240, box, out)
    assert place == [32, 32, 32, 32]


def test_all_of_an_image_is_not_copied() -> None:
    data = pillow_jpeg(photograph(33, 47), 2, 1)
    record, lengths = index(data, 16, 16)
    stored, out = np.frombuffer(data, np.uint8), np.zeros(len(data), np.uint8)
    box = np.array([1, 15, 31, 18, 1], np.int32)
    assert splice(stored, 0, len(data), record[0], lengths, 33, 47, box, out) == (0, 0, 0, 33, 47)
    record["interval"] = 0
    box[:] = 3
    assert splice(stored, 0, len(data), record[0], lengths, 33, 47, box, out) == (0, 0, 0, 33, 47)
    assert not out.any()


def test_damage_is_reported_and_touches_nothing_else() -> None:
    """The crop is either right or refused, and no byte outside the buffers is used."""
    draw = np.random.default_rng(11)
    height, width = 97, 130
    data = pillow_jpeg(photograph(height, width), 2, 3)
    record, lengths = index(data, 16, 16)
    whole = by_pillow(data)
    refused = 0
    for turn, box in enumerate(some_boxes(draw, height, width, 400)):
        damaged, shorter, size = record.copy(), lengths.copy(), len(data)
        kind = turn % 4
        if kind == 0:  # two lengths trade some bytes: their sum is right
            a, b = draw.integers(0, len(lengths), 2)
            change = min(int(draw.integers(1, 20)), int(shorter[a]))
            shorter[a] -= change
            shorter[b] += change
        elif kind == 1:
            shorter[draw.integers(len(lengths))] ^= 1 << draw.integers(16)
        elif kind == 2:
            field = str(draw.choice(RECORD.names))
            damaged[field] ^= RECORD[field].type(1 << draw.integers(8 * RECORD[field].itemsize))
        else:
            size = int(draw.integers(0, len(data)))
        stored = np.frombuffer(data, np.uint8)[:size]
        out = np.full(len(data) + 64, 0xA5, np.uint8)
        written, y0, x0, h, w = splice(
            stored, 0, size, damaged[0], shorter, height, width, box, out[: len(data)]
        )
        assert (out[len(data) :] == 0xA5).all()
        if written == MISMATCH:
            refused += 1
        elif written > 0:
            small = by_pillow(out[:written].tobytes())
            assert small.shape == (h, w, 3)
            assert np.array_equal(cut(small, box, y0, x0), cut(whole, box)), (kind, box)
        else:
            assert (y0, x0, h, w) == (0, 0, height, width)
    assert refused > 200


def test_a_changed_byte_of_the_stream_is_noticed_where_it_is_looked_at() -> None:
    data = pillow_jpeg(photograph(97, 130), 2, 3)
    record, lengths = index(data, 16, 16)
    box = np.array([20, 20, 30, 30, 0], np.int32)
    out = np.empty(len(data), np.uint8)

    def written(at: int, value: int) -> int:
        stored = np.frombuffer(data, np.uint8).copy()
        stored[at] = value
        found = splice(stored, 0, len(data), record[0], lengths, 97, 130, box, out)
        return int(found[0])

    frame, head = int(record["frame"][0]), int(record["head"][0])
    assert written(5, data[5]) > 0
    for at in (0, frame - 5, frame - 4, frame, frame + 1, frame + 3, frame + 4, frame + 6):
        assert written(at, data[at] ^ 2) == MISMATCH, at
    assert written(head - 14, 0) == MISMATCH  # the scan header
    # The marker after segment 3 (second row, first of three), which the crop needs.
    behind = head + int(lengths[:4].sum(dtype=np.int64)) + 2 * 3
    assert data[behind : behind + 2] == b"\xff\xd3"
    assert written(behind + 1, 0xD4) == written(behind, 0xFE) == MISMATCH


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("splice")
    (root / "data" / "x").mkdir(parents=True)
    for i in range(4):
        image = photograph(120 + i, 160 - i, i % 2)
        image.save(root / "data" / "x" / f"{i}.jpg", quality=90)
    write_beton(SampleIndex.from_folder(root / "data"), root / "s.beton", workers=1)
    return root / "s.beton"


def test_a_batch_of_streams_and_boxes_within_them(beton: Path) -> None:
    indices = np.array([2, 0, 3], np.int64)
    boxes = np.array([[10, 20, 30, 40, 1], [0, 0, 120, 160, 0], [90, 100, 33, 57, 0]], np.int32)
    with Beton.open(beton) as opened:
        assert opened.segments is not None
        streams, shifted = splice_batch(opened, indices, boxes)
        assert len(streams[0]) < 0.6 * opened.sizes[2]
        assert streams[1].base is not None and len(streams[1]) == opened.sizes[0]  # not copied
        for i, stream, box, moved in zip(indices, streams, boxes, shifted, strict=True):
            whole = by_pillow(opened.payload(int(i)).tobytes())
            assert np.array_equal(cut(by_pillow(stream.tobytes()), moved), cut(whole, box))
            assert (moved[2:] == box[2:]).all()
        plain, same = splice_batch(replace(opened, segments=None), indices, boxes)
        assert [len(s) for s in plain] == opened.sizes[indices].tolist() and same is boxes
        lengths = opened.segments.lengths.copy()
        lengths[opened.segments.records["first"][3]] += 1
        broken = replace(opened, segments=Segments(opened.segments.records, lengths))
        with pytest.raises(ImageError, match=r"s\.beton: sample 3: .*do not fit the side file"):
            splice_batch(broken, indices, boxes)
