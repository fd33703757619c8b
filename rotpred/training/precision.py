"""Automatic mixed precision."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from pipelines.batch import DTYPES
from pipelines.spec import Precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Autocast to bf16 or fp16, or nothing in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
