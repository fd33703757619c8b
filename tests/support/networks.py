"""Networks with distinct values in every tensor, and comparison of weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

State = dict[str, torch.Tensor]
N = TypeVar("N", bound=nn.Module)


def stir(net: N) -> N:
    """Give every tensor distinct values, including statistics and counters of batch norm."""
    draw = torch.Generator().manual_seed(len(net.state_dict()))
    for key, value in net.state_dict().items():
        if not value.is_floating_point():
            value.fill_(7)
        elif "running_var" in key:
            value.uniform_(0.5, 2.0, generator=draw)
        elif value.ndim < 2:
            value.uniform_(-0.5, 0.5, generator=draw)
    return net.eval()


def equal(a: State, b: State) -> bool:
    """Whether two state dicts have the same keys, types and values."""
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def with_prefix(state: State, prefix: str) -> State:
    """The same tensors under prefixed keys."""
    return {prefix + key: value for key, value in state.items()}
