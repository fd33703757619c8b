"""The feature gallery of the page: attention, projection and neighbours on example images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipelines.loader import open_loader
from pipelines.spec import CenterCrop
from rotpred.distributed import Rank
from rotpred.plots import features as feature_plots
from rotpred.recipes.knn import cifar10_knn, in1k_knn
from rotpred.records.tensorboard import pixels
from rotpred.report.page import Block, Heading, ImageBlock, Text, png
from rotpred.weights.frozen_backbone import load_frozen_backbone


def feature_gallery(
    weights: str,
    data: str,
    *,
    backbone: str | None = None,
    stage: str | None = None,
    samples: int = 500,
) -> list[Block]:
    """Plot features: attention of every stage, a projection, nearest neighbours. Runs on the CPU.

    Args:
        weights: A file, or "random".
        data: A beton or a folder of images, with or without labels.
        backbone: The architecture; None if the file names it.
        stage: Its averaged feature map is projected and compared; None for the last stage.
        samples: Number of images drawn from the data; always the same ones.

    Raises:
        ValueError: Weights, architecture and data do not fit together, or the data have fewer than
            five images.
        FileNotFoundError: There are no such data or weights.
    """
    torch.manual_seed(0)  # for random weights
    network, sha = load_frozen_backbone(backbone, weights, Rank())
    stage = stage or network.stage_names[-1]
    if stage not in network.stage_names:
        raise ValueError(
            f"{network.arch} has no stage {stage}: it has {', '.join(network.stage_names)}"
        )
    position = network.stage_names.index(stage)
    spec = in1k_knn().val
    if network.arch.startswith(("nin", "resnet18_")):  # networks for small images
        spec = replace(cifar10_knn().val, crop=CenterCrop(32, 32))
    # The folder engine (torchvision) is always installed, so the page is the same everywhere.
    spec = replace(spec, data=data, max_samples=samples, batch_size=50, engine="folder")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.normalize.mean, spec.normalize.std))
    shown, pooled, ids = [], [], []
    with open_loader(spec) as loader, torch.no_grad():
        for batch in loader.epoch(0):
            rows = batch.images[batch.valid]
            pixels_NCHW = (rows * std + mean).round().clamp(0, 255).byte()
            shown.append(pixels_NCHW.permute(0, 2, 3, 1).numpy())
            pooled.append(network.stages(rows)[position].double().mean((2, 3)).numpy())
            ids.append(batch.labels[batch.valid].numpy())
        images, features, labels = (np.concatenate(part) for part in (shown, pooled, ids))
        if len(images) < 5:
            raise ValueError(f"{data} has {len(images)} images: a gallery needs at least 5")
        chosen = feature_plots.examples(labels, 6)
        views = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float()
        feature_maps = network.stages(
            ((views - mean) / std).contiguous(memory_format=torch.channels_last)
        )
        # A feature map of 1 x 1 shows nothing.
        shown_maps = {
            name: feature_map
            for name, feature_map in zip(network.stage_names, feature_maps, strict=True)
            if feature_map[0, 0].numel() > 1
        }
        classes = loader.classes
    figures = {
        "Attention of each stage: sum over channels of |activation|^p": (
            feature_plots.attention_grid(
                images[chosen], list(shown_maps.values()), names=list(shown_maps)
            )
        ),
        f"{stage}, averaged: {len(images)} images in two dimensions": (
            feature_plots.projection(features, labels, classes=classes)
        ),
        f"{stage}, averaged: nearest neighbours by cosine similarity; red: another class": (
            feature_plots.retrieval(images, features, labels, queries=chosen, classes=classes)
        ),
    }
    about = f"Weights: {Path(weights).name} {sha[:12]}".strip()
    return [
        Heading("Features", 2),
        Text(f"{about} ({network.arch}). Images: {Path(data).name}."),
        *(ImageBlock(title, png(pixels(figure))) for title, figure in figures.items()),
    ]
