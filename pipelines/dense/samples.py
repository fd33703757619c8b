"""Opening of data sets for detection and segmentation, and loading of single samples."""

from __future__ import annotations

import itertools
import logging
from typing import NamedTuple

import numpy as np
import torch
from torchvision import tv_tensors

from pipelines.arrays import Float64, Int64
from pipelines.datasets import cityscapes, coco, voc
from pipelines.datasets.annotations import AnnotationErrors, DenseSamples, Objects
from pipelines.dense import transforms
from pipelines.dense.spec import DenseSpec, RatioCrop
from pipelines.dense.transforms import ResizePlan, Scene
from pipelines.imaging.decode import ImageError
from pipelines.imaging.torchvision_decode import decode

log = logging.getLogger(__name__)


class SampleSlot(NamedTuple):
    """The part of a batch that one sample is written to."""

    image: torch.Tensor
    """uint8 (H, W, 3)."""
    mask: torch.Tensor | None
    """uint8 (H, W), when training on masks."""


class LoadedSample(NamedTuple):
    """What a thread returns besides the pixels it wrote."""

    size: tuple[int, int]
    """Height and width of the image, without padding."""
    corner: tuple[int, int]
    """Top and left of the crop."""
    target: dict[str, torch.Tensor] | None
    """A `Target` on the CPU, when training on objects."""


def load_sample(
    samples: DenseSamples,
    spec: DenseSpec,
    i: int,
    plan: ResizePlan,
    draw: Float64,
    slot: SampleSlot,
) -> LoadedSample:
    """Load a sample. Thread-safe.

    Args:
        samples: The data set.
        spec: Options.
        i: Position of the sample.
        plan: How to resize and crop it.
        draw: float64 (count,), random numbers of the sample (`transforms.draw_uniforms`).
        slot: Output, written at the top left.

    Raises:
        ImageError: The image or its mask is damaged, or its size differs from its annotation.
    """
    scene = Scene(_image(samples, i))
    height, width = scene.image.shape[1:]
    labels, top, left = None, 0, 0
    if spec.train and samples.kind == "objects":
        objects = training_objects(samples.objects(i), spec)
        labels = torch.from_numpy(objects.labels + 1)
        scene.boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(objects.boxes), format="XYXY", canvas_size=(height, width)
        )
        if samples.outlined and spec.masks:
            pixels = coco.rasterize(objects.outlines, height, width)
            scene.masks = tv_tensors.Mask(torch.from_numpy(pixels))
    elif spec.train:
        scene.masks = tv_tensors.Mask(torch.from_numpy(samples.mask(i))[None])
    scene = transforms.resize_scene(scene, plan)
    if isinstance(spec.geometry, RatioCrop):
        assert scene.masks is not None
        top, left = transforms.choose_corner(scene.masks[0].numpy(), spec.geometry, draw)
        scene = transforms.crop_scene(scene, top, left, spec.geometry.size)
    image = scene.image.as_subclass(torch.Tensor)
    if spec.train and spec.photometric:
        image = transforms.distort(image, draw)
    height, width = plan.size
    np.copyto(slot.image[:height, :width].numpy(), image.permute(1, 2, 0).numpy())
    if slot.mask is not None:
        assert scene.masks is not None
        np.copyto(slot.mask[:height, :width].numpy(), scene.masks[0].numpy())
    target = None
    if labels is not None:
        parts = {"boxes": scene.boxes, "labels": labels, "masks": scene.masks}
        target = {key: x.as_subclass(torch.Tensor) for key, x in parts.items() if x is not None}
        if slot.image.is_pinned():
            target = {key: x.pin_memory() for key, x in target.items()}
    return LoadedSample(plan.size, (top, left), target)


def open_dense_samples(spec: DenseSpec) -> DenseSamples:
    """Open the data set that a spec names. Starts no threads.

    Raises:
        FileNotFoundError: A folder, list or file does not exist.
        ValueError: The spec, a list or an annotation is invalid. Names file and line.
    """
    kind, _, parts = spec.data.partition(":")
    errors = AnnotationErrors(spec.max_invalid_annotations)
    if spec.classes and kind not in ("voc", "vocseg"):
        raise ValueError(f"{spec.data}: classes are for voc and vocseg data")
    if not spec.masks and kind in ("vocseg", "cityscapes"):
        raise ValueError(f"{spec.data}: masks=False leaves nothing to learn")
    match kind:
        case "voc" | "vocseg":
            read = voc.index_boxes if kind == "voc" else voc.index_masks
            return read(
                parts, spec.root, errors=errors, classes=spec.classes, limit=spec.max_samples
            )
        case "coco":
            return coco.index_objects(parts, spec.root, errors=errors, limit=spec.max_samples)
        case "cityscapes":
            return cityscapes.index_masks(parts, spec.root, errors=errors, limit=spec.max_samples)
    raise ValueError(
        f"data {spec.data!r}: expected voc:DIR/LIST, vocseg:DIR/LIST, coco:NAME or cityscapes:SPLIT"
    )


def training_indices(samples: DenseSamples, spec: DenseSpec) -> Int64:
    """Return the positions of images that can be trained on, int64 (n,), ascending.

    Raises:
        ValueError: There are none.
    """
    chosen = [
        i
        for i, size in enumerate(samples.sizes)
        if size.min() >= samples.least_side
        and (
            samples.kind == "masks"
            or spec.keep_empty
            or len(training_objects(samples.objects(i), spec).labels) > 0
        )
    ]
    if not chosen:
        raise ValueError(f"{spec.data}: no image has a box to train on")
    if len(chosen) < len(samples):
        log.info("%s: training on %d of %d images", spec.data, len(chosen), len(samples))
    return np.array(chosen, np.int64)


def training_objects(objects: Objects, spec: DenseSpec) -> Objects:
    """Return the objects to train on: no crowds, and difficult ones only if the spec allows."""
    keep = ~objects.crowd
    if not spec.keep_difficult:
        keep &= ~objects.difficult
    if keep.all():
        return objects
    outlines = tuple(itertools.compress(objects.outlines, keep))
    return Objects(
        objects.boxes[keep],
        objects.labels[keep],
        objects.difficult[keep],
        objects.crowd[keep],
        outlines,
    )


def _image(samples: DenseSamples, i: int) -> tv_tensors.Image:
    path, size = samples.path(i), tuple(samples.sizes[i])
    try:
        pixels = decode(path.read_bytes())
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    if tuple(pixels.shape[1:]) != size:
        raise ImageError(
            f"{path}: {pixels.shape[2]}x{pixels.shape[1]} pixels, its annotation says "
            f"{size[1]}x{size[0]}"
        )
    return tv_tensors.Image(pixels)
