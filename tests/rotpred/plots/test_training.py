"""Training figures: views, confusion matrix, filters, curves, checked by their contents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pipelines.batch import IGNORE
from pipelines.spec import CIFAR10
from rotpred.distributed import Rank
from rotpred.plots.training import confusion, curves, filters, views_grid
from rotpred.records.log import RunLog, read_rows
from rotpred.records.tensorboard import pixels as pixels_of

pytestmark = pytest.mark.timeout(60)


def texts(fig: Figure) -> list[str]:
    return [text.get_text() for ax in fig.axes for text in (ax.title, *ax.texts)]


def shown(fig: Figure) -> Iterator[npt.NDArray[np.float64]]:
    for ax in fig.axes:
        for image in ax.get_images():
            yield np.asarray(image.get_array())


def views(batch: int, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, 16, 16), generator=generator).float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR10.mean, CIFAR10.std))
    x = ((pixels - mean) / std).to(dtype)
    turned = torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])
    return turned, torch.arange(4).repeat_interleave(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_grid_shows_each_view_under_its_label(dtype: torch.dtype) -> None:
    images, targets = views(10, dtype=dtype)
    targets[12] = IGNORE  # sample 2 at 90 degrees
    fig = views_grid(images, targets=targets, normalize=CIFAR10)
    assert texts(fig) == [
        *["0°"] * 8,
        *("90°", "90°", "masked", *["90°"] * 5),
        *["180°"] * 8,
        *["270°"] * 8,
    ]
    panels = list(shown(fig))
    upright = panels[1]
    mean, std = (np.array(v) for v in (CIFAR10.mean, CIFAR10.std))
    expected = (images[1].float().permute(1, 2, 0).numpy() * std + mean) / 255
    np.testing.assert_allclose(upright, expected.clip(0, 1), atol=1e-5)
    for k in range(4):
        np.testing.assert_allclose(panels[8 * k + 1], np.rot90(upright, k), atol=1e-2)


def test_views_grid_takes_a_batch_smaller_than_its_columns() -> None:
    images, targets = views(1)
    assert len(views_grid(images, targets=targets, normalize=CIFAR10).axes) == 4


@pytest.mark.parametrize("rows", [0, 6])
def test_views_grid_refuses_what_are_not_four_views(rows: int) -> None:
    with pytest.raises(ValueError, match=r"4\*B"):
        views_grid(
            torch.zeros(rows, 3, 4, 4),
            targets=torch.zeros(rows, dtype=torch.long),
            normalize=CIFAR10,
        )


def test_confusion_shows_counts_and_shares_of_rows() -> None:
    counts = torch.tensor([[50, 25, 25, 0], [0, 3, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1997]])
    fig = confusion(counts)
    words = texts(fig)
    assert words[0] == "97.4 % of 2,104 correct"
    assert words[1:5] == ["50.0 %", "50", "25.0 %", "25"]
    assert words[9:13] == ["0.0 %", "0", "75.0 %", "3"]
    assert "1,997" in words
    (share,) = [image for image in shown(fig) if image.shape == (4, 4)]
    np.testing.assert_allclose(share.sum(axis=1), [100, 100, 0, 100])


def test_confusion_refuses_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        confusion(torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (13, 3, 3, 3), (96, 3, 11, 11), (1, 3, 5, 5)])
def test_filters_are_all_on_the_sheet(shape: tuple[int, int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (sheet,) = shown(filters(weight))
    count, _, height, width = shape
    zoom = 42 // max(height, width)
    covered = int((sheet != 1).any(axis=2).sum())
    full = count * height * width * zoom**2
    assert 0.95 * full < covered <= full
    assert 0 <= sheet.min() and sheet.max() <= 1


def test_a_dead_filter_is_drawn_flat() -> None:
    (sheet,) = shown(filters(torch.zeros(4, 3, 3, 3)))
    assert np.isfinite(sheet).all()


def test_filters_refuse_other_layers() -> None:
    with pytest.raises(ValueError, match=r"\(8, 16, 3, 3\)"):
        filters(torch.zeros(8, 16, 3, 3))


def test_curves_of_real_rows(tmp_path: Path) -> None:
    with RunLog(tmp_path, object(), Rank(), total_steps=40) as log:
        for step in range(1, 41):
            log.interval(
                step=step,
                epoch=0,
                values={"loss": float("nan") if step == 3 else 2.0 / step, "accuracy": 25.0 + step},
                images=8,
                views=32,
                wait_seconds=0.0,
                seconds=0.5,
            )
        rows = read_rows(tmp_path / "log.jsonl")
        fig = curves(rows)
        log.figure("curves", fig)
    drawn = {ax.get_title(loc="left"): ax for ax in fig.axes if ax.get_visible()}
    assert list(drawn) == ["Loss", "Accuracy (%)", "Throughput (1/s)"], "lr was never logged"
    steps, losses = drawn["Loss"].lines[0].get_data()
    assert list(steps) == list(range(1, 41))
    assert np.isnan(losses[2]) and losses[39] == 0.05
    both = {str(line.get_label()): line for line in drawn["Throughput (1/s)"].lines}
    assert set(np.asarray(both["views/s"].get_ydata())) == {64.0}
    assert set(np.asarray(both["images/s"].get_ydata())) == {16.0}
    with Image.open(tmp_path / "figures" / "curves.png") as image:
        assert image.size == (1104, 696)
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("rows", [[], [{"step": 1, "epoch": 0, "loss": None}]])
def test_curves_of_nothing_are_refused(rows: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="no rows to draw"):
        curves(rows)


def test_every_figure_makes_an_image_with_something_on_it() -> None:
    images, targets = views(8)
    for fig in (
        views_grid(images, targets=targets, normalize=CIFAR10),
        confusion(torch.eye(4) * 7),
        filters(torch.randn(64, 3, 7, 7)),
        curves([{"step": 1, "loss": 1.0}]),
    ):
        image = pixels_of(fig)
        height, width, channels = image.shape
        assert channels == 3 and height > 250 and width > 350
        assert image.std() > 5
