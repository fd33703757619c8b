"""Automatic mixed precision."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from pipelines.batch import DTYPES
from pipelines.spec import Precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Return a context that autocasts to bf16 or fp16; with fp32 it does nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
