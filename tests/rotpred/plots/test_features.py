"""Feature figures: attention, nearest neighbours, projections."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rotpred.plots import features as feature_plots

pytestmark = pytest.mark.timeout(120)


def test_attention_is_the_normalised_sum_of_powers() -> None:
    maps = torch.randn(3, 7, 4, 5, generator=torch.Generator().manual_seed(0)) * 1e12
    maps[2] = 4.0
    for power in feature_plots.POWERS:
        found = feature_plots.attention(maps, power=power).numpy()
        total = (np.abs(maps.double().numpy()) ** power).sum(1)
        low, high = total.min((1, 2), keepdims=True), total.max((1, 2), keepdims=True)
        expected = (total - low)[:2] / (high - low)[:2]
        np.testing.assert_allclose(found[:2], expected, atol=1e-4)
        assert (found[2] == 0).all()  # the same everywhere: nothing stands out
    assert feature_plots.attention(torch.zeros(1, 2, 3, 3), power=4).eq(0).all()


def test_nearest_are_the_highest_cosines_but_not_itself() -> None:
    features = np.random.default_rng(0).normal(size=(30, 6))
    features[7] = 3 * features[4] + 0.01
    found, similar = feature_plots.nearest(features, [4, 11], k=5)
    for line, query in enumerate((4, 11)):
        cosine = {
            i: float(row @ features[query] / np.linalg.norm(row) / np.linalg.norm(features[query]))
            for i, row in enumerate(features)
            if i != query
        }
        expected = sorted(cosine, key=lambda i: -cosine[i])[:5]
        assert found[line].tolist() == expected
        np.testing.assert_allclose(similar[line], [cosine[i] for i in expected])
    assert found[0, 0] == 7
    with pytest.raises(ValueError, match="30 neighbours of 29"):
        feature_plots.nearest(features, [0], k=30)


def test_examples_take_classes_in_turn() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert feature_plots.examples(labels, 3) == [0, 3, 5]
    assert feature_plots.examples(labels, 5) == [0, 1, 3, 4, 5]
    assert feature_plots.examples(labels, 2) == [0, 5]
    assert feature_plots.examples(np.arange(100), 3) == [0, 50, 99]
    assert feature_plots.examples(np.full(4, -1), 9) == [0, 1, 2, 3]


def test_projection_separates_what_is_separate() -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 12)
    features = draw.normal(size=(36, 10)) + 30 * np.eye(10)[labels]
    once, again = feature_plots.project(features), feature_plots.project(features)
    for points, same in zip(once, again, strict=True):
        assert points.shape == (36, 2) and (points == same).all()
        for i in range(36):
            gaps = np.linalg.norm(points - points[i], axis=1)
            gaps[i] = np.inf
            assert labels[gaps.argmin()] == labels[i]
    variance = np.linalg.eigvalsh(np.cov(features.T))[::-1][:2]
    np.testing.assert_allclose(once[0].var(axis=0, ddof=1), variance)
    with pytest.raises(ValueError, match="4 samples"):
        feature_plots.project(features[:4])


def test_retrieval_and_projection_name_the_classes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0, 0, 1, 1, 2, -1])
    features = np.eye(6) + 0.1
    features[1] = features[0] + 0.01
    fig = feature_plots.retrieval(images, features, labels, queries=[0], classes=("cat", "dog"))
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[0] == "cat" and titles[1] == "cat\n1.00" and len(titles) == 6
    assert {title.partition("\n")[0] for title in titles[2:]} == {"dog", "2", "no label"}
    np.testing.assert_array_equal(fig.axes[1].get_images()[0].get_array(), images[1])
    legend = feature_plots.projection(features, labels, classes=("cat", "dog")).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["no label", "cat", "dog", "2"]
