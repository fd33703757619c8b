"""Synthetic test images and two photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

COUNT = 37
"""Images in the `folder` and `beton` fixtures: prime, so that no batch size or world divides it."""


def smooth_image(seed: int, height: int, width: int) -> Image.Image:
    """Random colors without fine detail, so that decoders and resampling filters agree."""
    coarse = np.random.default_rng(seed).integers(40, 216, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save_jpeg(path: Path, image: Image.Image, **options: object) -> None:
    """Save at quality 95 without chroma subsampling, unless `options` say otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", **{"quality": 95, "subsampling": 0, **options})  # type: ignore[arg-type]


def gradient_image(height: int = 24, width: int = 40, mode: str = "RGB") -> Image.Image:
    """A smooth image in which every corner has another color."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([255 * y / height, 255 * x / width, 0 * x + 60], axis=2)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def noise_image(height: int, width: int) -> Image.Image:
    """Noise, a function of its size."""
    pattern = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pattern)


def photographs() -> list[Image.Image]:
    """scikit-learn's two sample photographs."""
    return [Image.fromarray(image) for image in load_sample_images().images]
