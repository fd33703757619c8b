"""What the features of some weights look like on images: blocks of the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors
import torch

from pipelines.loader import open_loader
from pipelines.spec import CenterCrop
from rotpred.distributed import Rank
from rotpred.plots import features as feature_plots
from rotpred.recipes.knn import cifar10_knn, in1k_knn
from rotpred.records.tensorboard import pixels
from rotpred.report.page import Block, Heading, ImageBlock, Text, png
from rotpred.weights.frozen_backbone import load_frozen_backbone


def showcase(
    weights: str, data: str, *, backbone: str = "", stage: str = "", samples: int = 500
) -> list[Block]:
    """Look at features: attention of every stage, a projection, nearest neighbours. On the CPU.

    Args:
        weights: a file, or "random".
        data: a beton or a folder of images, with labels or without.
        backbone: the architecture; empty where the file names it.
        stage: whose averaged map is projected and compared; empty for the last.
        samples: how many images are drawn from the data, the same ones each time.

    Raises:
        ValueError: weights, architecture and data do not fit together, or the data have fewer than
            five images; in words.
        FileNotFoundError: there are no such data or weights.
    """
    torch.manual_seed(0)  # of the control's weights
    network, sha = load_frozen_backbone(backbone or _architecture(weights), weights, Rank())
    stage = stage or network.stage_names[-1]
    if stage not in network.stage_names:
        raise ValueError(f"{network.arch} has no stage {stage}: {', '.join(network.stage_names)}")
    place = network.stage_names.index(stage)
    spec = in1k_knn().val
    if network.arch.startswith(("nin", "resnet18_")):  # networks for small images
        spec = replace(cifar10_knn().val, crop=CenterCrop(32, 32))
    # torchvision, which is everywhere: the page does not depend on which engines are installed.
    spec = replace(spec, data=data, max_samples=samples, batch_size=50, engine="folder")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.normalize.mean, spec.normalize.std))
    shown, pooled, ids = [], [], []
    with open_loader(spec) as loader, torch.no_grad():
        for batch in loader.epoch(0):
            rows = batch.images[batch.valid]
            pixels_NCHW = (rows * std + mean).round().clamp(0, 255).byte()
            shown.append(pixels_NCHW.permute(0, 2, 3, 1).numpy())
            pooled.append(network.stages(rows)[place].double().mean((2, 3)).numpy())
            ids.append(batch.labels[batch.valid].numpy())
        images, features, labels = (np.concatenate(part) for part in (shown, pooled, ids))
        if len(images) < 5:
            raise ValueError(f"{data} has {len(images)} images: a gallery needs at least 5")
        chosen = feature_plots.examples(labels, 6)
        views = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float()
        maps = network.stages(((views - mean) / std).contiguous(memory_format=torch.channels_last))
        # A map of one place has nothing to show.
        seen = {n: m for n, m in zip(network.stage_names, maps, strict=True) if m[0, 0].numel() > 1}
        classes = loader.classes
    figures = {
        "Attention: where each stage is active, sum over channels of |activation|^p": (
            feature_plots.attention_grid(images[chosen], list(seen.values()), names=list(seen))
        ),
        f"{stage}, averaged, of {len(images)} images in two dimensions": (
            feature_plots.projection(features, labels, classes=classes)
        ),
        f"{stage}, averaged: the nearest neighbours by cosine; red: another class": (
            feature_plots.retrieval(images, features, labels, queries=chosen, classes=classes)
        ),
    }
    about = f"Weights: {Path(weights).name} {sha[:12]}".strip()
    return [
        Heading("What the features look like", 2),
        Text(f"{about} ({network.arch}). Images: {Path(data).name}."),
        *(ImageBlock(title, png(pixels(figure))) for title, figure in figures.items()),
    ]


def _architecture(weights: str) -> str:
    """The network that a file of ours names.

    Raises:
        ValueError: it names none.
    """
    if weights.endswith(".safetensors") and Path(weights).is_file():
        try:
            with safetensors.safe_open(weights, "pt") as file:
                name = (file.metadata() or {}).get("arch")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{weights} is damaged: {error}") from error
        if name:
            return str(name)
    raise ValueError(f"{weights} does not name its architecture: give --backbone")
