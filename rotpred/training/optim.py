"""Optimisers, and weight-decay rules by module type."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from rotpred.training.settings import DecayRule, Optim

NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm and InstanceNorm of any dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
"""Module types whose parameters count as norm parameters. Names and shapes do not tell:
downsample.1 is a norm, and a linear layer may have a single output."""


def param_groups(
    model: nn.Module, *, rule: DecayRule, weight_decay: float
) -> list[dict[str, object]]:
    """Group the trainable parameters by weight decay and LARS adaptation.

    Args:
        model: Every parameter that requires a gradient is taken once.
        rule: Which of them decay.
        weight_decay: Weight decay of those that do.

    Returns:
        Groups with `params`, `weight_decay` and `adapt` (False for norms and biases, which LARS
        does not adapt).

    Raises:
        ValueError: No parameter requires a gradient.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, NORMS)
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            # By name: a one-dimensional weight is still a weight.
            is_bias = name.rpartition(".")[2] == "bias"
            no_decay = (rule != "all" and is_norm) or (rule == "no_norm_no_bias" and is_bias)
            key = (0.0 if no_decay else weight_decay, not (is_norm or is_bias))
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    return [
        {"params": parameters, "weight_decay": decay, "adapt": adapt}
        for (decay, adapt), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, optim: Optim, lr: float) -> torch.optim.Optimizer:
    """Build the optimiser for a model that is already on its device.

    SGD is fused on CUDA (one kernel per group, and no wait for the device under a GradScaler) and
    foreach on a CPU.

    Args:
        model: Its trainable parameters are grouped by `param_groups`.
        optim: Optimiser and hyperparameters.
        lr: The initial learning rate; `set_lr` changes it.

    Raises:
        ValueError: `optim` needs apex, which is not installed, or no parameter is trainable.
    """
    groups = param_groups(model, rule=optim.decay_rule, weight_decay=optim.weight_decay)
    on_cuda = all(p.is_cuda for p in model.parameters() if p.requires_grad)
    built: torch.optim.Optimizer
    if optim.kind == "lars":
        built = Lars(groups, lr=lr, momentum=optim.momentum, trust=optim.trust)
    elif optim.kind == "apex_sgd":
        built = from_apex("optimizers", "FusedSGD", "kind apex_sgd")(
            groups, lr=lr, momentum=optim.momentum, nesterov=optim.nesterov
        )
    else:
        sgd = fused_sgd if on_cuda else functools.partial(torch.optim.SGD, foreach=True)
        built = sgd(groups, lr=lr, momentum=optim.momentum, nesterov=optim.nesterov)
    return built


def fused_sgd(
    groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool
) -> torch.optim.SGD:
    """Build torch's fused SGD with momentum buffers initialised to zero.

    Torch allocates the buffers in the first step. If a GradScaler finds an overflow, as it usually
    does in the first steps, that step writes nothing, and the second one reads uninitialised
    memory. Without dampening, a step from zero equals torch's first step.
    """
    built = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:
        for parameter in (p for group in built.param_groups for p in group["params"]):
            built.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return built


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: You, Gitman, Ginsburg 2017 (arXiv 1708.03888), algorithm 1.

    For each tensor w with gradient g and weight decay b:
    rate = trust * |w| / (|g| + b * |w|); v <- momentum * v + lr * rate * (g + b * w); w <- w - v.
    The learning rate is inside the momentum, as in the paper. The rate is 1 for groups with
    adapt=False (norms and biases), and for tensors where |w| or |g| is zero.
    """

    def __init__(
        self, params: Iterable[dict[str, object]], *, lr: float, momentum: float, trust: float
    ) -> None:
        """Take the parameter groups that `param_groups` returns."""
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0}
        super().__init__(params, {**defaults, "adapt": True})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters without waiting for the device."""
        for group in self.param_groups:
            decay = group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad.add(p, alpha=decay)
                if group["adapt"]:
                    w_norm, g_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(p.grad)
                    rate = group["trust"] * w_norm / (g_norm + decay * w_norm)
                    update.mul_(torch.where((w_norm > 0) & (g_norm > 0), rate, 1.0))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                velocity = state["momentum_buffer"]
                velocity.mul_(group["momentum"]).add_(update, alpha=group["lr"])
                p.sub_(velocity)


def from_apex(module: str, name: str, option: str) -> Callable[..., Any]:
    """Return a function or class of NVIDIA apex.

    Args:
        module: "parallel", say.
        name: Its name in that module.
        option: The setting that needs it, for the message.

    Raises:
        ValueError: It is not installed; the message says how to.
    """
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(f"apex.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{option} needs NVIDIA apex ({error}). Build it from source: APEX_CPP_EXT=1 "
            'APEX_CUDA_EXT=1 pip install --no-build-isolation "apex @ '
            'git+https://github.com/NVIDIA/apex" (the package apex on PyPI is something else).'
        ) from error
    return found
