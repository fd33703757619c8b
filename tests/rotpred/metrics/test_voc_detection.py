"""VOC average precision, against exact fractions and cases computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.datasets.annotations import Objects
from rotpred.metrics.average_precision import average_precision_of
from rotpred.metrics.detections import ImageDetections
from rotpred.metrics.voc_detection import OVERLAPS, class_aps, voc_metrics
from tests.support.detections import found

pytestmark = pytest.mark.timeout(60)


@dataclass
class Samples:
    """A data set without images."""

    truth: Sequence[Objects]
    classes: tuple[str, ...] = ("a", "b", "c", "d")
    data_id: str = "test"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{i:06}" for i in range(len(self.truth)))

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        return np.full((len(self.truth), 2), 100)

    def __len__(self) -> int:
        return len(self.truth)

    def path(self, i: int) -> Path:
        raise NotImplementedError

    def objects(self, i: int) -> Objects:
        return self.truth[i]

    def mask(self, i: int) -> npt.NDArray[np.uint8]:
        raise NotImplementedError


def objects(*rows: tuple[int, int, int, int, int, int]) -> Objects:
    """Objects of one image, from (left, top, right, bottom, label, difficult) each."""
    table = np.array(rows, np.int64).reshape(-1, 6)
    return Objects(
        boxes=table[:, :4].astype(np.float32),
        labels=table[:, 4],
        difficult=table[:, 5] > 0,
        crowd=np.zeros(len(table), bool),
    )


def random_case(
    seed: int, images: int, classes: int, *, many: int = 6
) -> tuple[list[ImageDetections], Samples]:
    """Objects, and detections that jitter, miss, repeat and invent some of them."""
    draw = np.random.default_rng(seed)
    truth, results = [], []
    for _ in range(images):
        k = int(draw.integers(0, many))
        corner, side = draw.integers(0, 60, (k, 2)), draw.integers(5, 40, (k, 2))
        boxes = np.hstack([corner, corner + side])
        labels = draw.integers(0, classes, k)
        flags = draw.random(k) < 0.25
        truth.append(
            Objects(boxes.astype(np.float32), labels.astype(np.int64), flags, np.zeros(k, bool))
        )
        chosen = draw.integers(0, k, int(draw.integers(0, 2 * many))) if k else []
        near = boxes[chosen] + draw.normal(0, 3, (len(chosen), 4))
        left = draw.uniform(0, 60, (3, 2))
        far = np.hstack([left, left + draw.uniform(1, 40, (3, 2))])
        mine = np.vstack([near, far]).astype(np.float32)
        names = np.hstack([labels[chosen], draw.integers(0, classes, 3)]).astype(np.int64)
        # Three decimals produce equal scores.
        scores = draw.random(len(mine)).astype(np.float32) * np.float32(0.05)
        results.append(ImageDetections(mine, names, scores))
    names = tuple(f"class {i}" for i in range(classes + 1))
    return results, Samples(truth, classes=names)


def tenths(value: float) -> Fraction:
    return Fraction(f"{value:.1f}")


def overlap(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    """As in the devkit: both corners belong to the box, hence the + 1."""
    a = [a[0] + 1, a[1] + 1, a[2], a[3]]
    b = [b[0] + 1, b[1] + 1, b[2], b[3]]
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return Fraction(0)
    sizes = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return width * height / (sum(sizes) - width * height)


def reference_aps(
    results: Sequence[ImageDetections], samples: Samples, label: int, least: Fraction
) -> tuple[float, float] | None:
    """11-point AP and area of one class, by the definition."""
    truth = {
        i: [
            ([Fraction(float(v)) for v in box], bool(flag))
            for box, kind, flag in zip(one.boxes, one.labels, one.difficult, strict=True)
            if kind == label
        ]
        for i, one in enumerate(samples.truth)
    }
    positives = sum(not flag for rows in truth.values() for _, flag in rows)
    if positives == 0:
        return None
    ranking = [
        (Fraction(f"{float(score):.3f}"), i, [tenths(float(v)) for v in box])
        for i, one in enumerate(results)
        for box, kind, score in zip(one.boxes, one.labels, one.scores, strict=True)
        if kind == label
    ]
    ranking.sort(key=lambda row: -row[0])
    taken: set[tuple[int, int]] = set()
    right, wrong = 0, 0
    points: list[tuple[Fraction, Fraction]] = []
    for _, i, box in ranking:
        best, place = Fraction(0), -1
        for k, (other, _flag) in enumerate(truth[i]):
            if (value := overlap(box, other)) > best:
                best, place = value, k
        if best > least:
            if truth[i][place][1]:
                continue
            if (i, place) in taken:
                wrong += 1
            else:
                taken.add((i, place))
                right += 1
        else:
            wrong += 1
        points.append((Fraction(right, positives), Fraction(right, right + wrong)))
    eleven = Fraction(0)
    for tenth in range(11):
        eleven += max((p for r, p in points if r >= Fraction(tenth, 10)), default=Fraction(0))
    area, before = Fraction(0), Fraction(0)
    for recall in sorted({r for r, _ in points}):
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return float(eleven / 11), float(area)


@pytest.mark.parametrize("seed", range(4))
def test_random_boxes_follow_the_definition(seed: int) -> None:
    results, samples = random_case(seed, images=25, classes=3)
    aps = class_aps(results, samples)
    assert np.isnan(aps.eleven[3]).all() and np.isnan(aps.area[3]).all(), "a class without objects"
    expected: list[list[tuple[float, float]]] = []
    for label in range(3):
        row = [reference_aps(results, samples, label, Fraction(p, 100)) for p in range(50, 100, 5)]
        expected.append([pair for pair in row if pair is not None])
    table = np.array(expected)  # (classes, overlaps, eleven and area)
    assert table.shape == (3, 10, 2)
    assert 0.02 < table[:, 0].min() and table[:, 0].max() < 0.98, "the case is trivial"
    np.testing.assert_allclose(aps.eleven[:3], table[:, :, 0], atol=1e-9, rtol=0)
    np.testing.assert_allclose(aps.area[:3], table[:, :, 1], atol=1e-9, rtol=0)
    values = voc_metrics(results, samples)
    expected_values = {
        f"{name}{suffix}": table[:, columns, k].mean()
        for k, suffix in enumerate(("", "/area"))
        for name, columns in (("AP50", 0), ("AP", slice(None)), ("AP75", 5))
    }
    assert list(values) == ["AP50", "AP", "AP75", "AP50/area", "AP/area", "AP75/area"]
    assert values == pytest.approx(expected_values, abs=1e-9)
    assert values["AP/area"] == aps.area[:3].mean() and values["AP75"] == aps.eleven[:3, 5].mean()


def test_by_hand() -> None:
    # Two objects of class 0, one of them difficult in the second image; one of class 1.
    samples = Samples(
        [objects((0, 0, 10, 10, 0, 0), (50, 50, 60, 60, 1, 0)),
         objects((0, 0, 10, 10, 0, 1), (20, 20, 30, 30, 0, 0))]
    )  # fmt: skip
    results = [
        found((0, 0, 10, 10, 0, 0.9), (0, 0, 10, 9, 0, 0.8), (50, 50, 60, 60, 2, 0.7)),
        found((0, 0, 10, 10, 0, 0.95), (20, 20, 30, 26, 0, 0.5)),
    ]
    aps = class_aps(results, samples)
    # Ranking of class 0: 0.95 meets the difficult one and does not count; 0.9 right; 0.8 is its
    # second one, wrong; 0.5 overlaps by 0.6. Precision 1 up to recall 0.5, then 2/3.
    assert aps.eleven[0, 0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11, abs=1e-12)
    assert aps.area[0, 0] == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)
    # At 0.6 and above, the last one is wrong: an overlap must exceed the threshold.
    assert aps.eleven[0, 1] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11, abs=1e-12)
    for k in range(2, 10):
        assert aps.eleven[0, k] == pytest.approx(6 / 11, abs=1e-12)
        assert aps.area[0, k] == pytest.approx(0.5, abs=1e-12)
    assert (aps.eleven[1] == 0).all() and np.isnan(aps.eleven[2:]).all()
    # Detections of class 2, which has no objects, are ignored; class 1 counts as 0.
    assert voc_metrics(results, samples)["AP75"] == pytest.approx(3 / 11, abs=1e-12)


def test_a_detection_takes_its_best_object_only() -> None:
    samples = Samples([objects((0, 0, 10, 10, 0, 0), (0, 0, 10, 12, 0, 0))])
    results = [found((0, 0, 10, 12, 0, 0.9), (0, 0, 10, 12, 0, 0.8))]
    # The second one exceeds the threshold with the first object too, but its best is another.
    assert class_aps(results, samples).area[0, 0] == pytest.approx(0.5, abs=1e-12)


def test_rounding_and_equal_scores() -> None:
    samples = Samples([objects((0, 0, 10, 10, 0, 0)), objects((0, 0, 10, 10, 0, 0))])
    # 0.9004 and 0.9001 both become 0.900: the wrong one of the first image comes first.
    results = [found((40, 40, 50, 50, 0, 0.9001)), found((0, 0, 10, 10, 0, 0.9004))]
    assert class_aps(results, samples).area[0, 0] == pytest.approx(0.25, abs=1e-12)
    assert class_aps(
        [found((40, 40, 50, 50, 0, 0.9001)), found((0, 0, 10, 10, 0, 0.9006))], samples
    ).area[0, 0] == pytest.approx(0.5, abs=1e-12)
    # A box of 5.04 rows counts as 5.0, exactly half, which is too little.
    one = Samples([objects((0, 0, 10, 10, 0, 0))])
    assert class_aps([found((0, 0, 10, 5.04, 0, 0.9))], one).area[0, 0] == 0
    assert class_aps([found((0, 0, 10, 5.06, 0, 0.9))], one).area[0, 0] == 1


def test_nothing_found_and_nothing_to_find() -> None:
    samples = Samples([objects((0, 0, 10, 10, 0, 0)), objects()])
    assert set(voc_metrics([found(), found()], samples).values()) == {0.0}
    with pytest.raises(ValueError, match="not difficult"):
        voc_metrics([found()], Samples([objects((0, 0, 10, 10, 0, 1))]))
    with pytest.raises(ValueError, match="1 images for a data set of 2"):
        voc_metrics([found()], samples)
    with pytest.raises(ValueError, match="not among the 4 classes"):
        voc_metrics([found(), found((0, 0, 1, 1, 4, 0.5))], samples)


def test_detections_are_checked() -> None:
    good = found((0, 0, 10, 10, 0, 0.5))
    with pytest.raises(ValueError, match="do not fit each other"):
        replace(good, labels=np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="not finite"):
        replace(good, scores=np.array([np.nan], np.float32))
    assert replace(good, masks=({"size": [1, 1], "counts": b"01"},)).masks[0]["counts"] == "01"


@pytest.mark.parametrize("positives", [1, 3, 10, 20, 37])
def test_a_perfect_ranking_is_one_and_half_of_it_half(positives: int) -> None:
    assert average_precision_of(np.ones(positives, bool), positives) == pytest.approx((1, 1))
    area, eleven = average_precision_of(np.ones(positives, bool), 2 * positives)
    assert (area, eleven) == pytest.approx((0.5, 6 / 11), abs=1e-12)


def test_voc2007_test_takes_seconds() -> None:
    draw = np.random.default_rng(0)
    truth, results = [], []
    for _ in range(4952):
        left = draw.integers(0, 300, (3, 2))
        boxes = np.hstack([left, left + draw.integers(20, 200, (3, 2))]).astype(np.float32)
        labels = draw.integers(0, 20, 3)
        truth.append(Objects(boxes, labels, draw.random(3) < 0.2, np.zeros(3, bool)))
        near = np.repeat(boxes, 33, axis=0) + draw.normal(0, 8, (99, 4)).astype(np.float32)
        scores = draw.random(99).astype(np.float32)
        results.append(ImageDetections(near, np.repeat(labels, 33), scores))
    samples = Samples(truth, classes=tuple(str(i) for i in range(20)))
    start = perf_counter()
    values = voc_metrics(results, samples)
    assert perf_counter() - start < 20
    assert 0 < values["AP75"] < values["AP50"] < 1
    assert len(OVERLAPS) == 10
