"""Training state: network, optimisers, gradient scaler and step."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from rotpred.distributed import Rank, barrier, data_parallel, from_main
from rotpred.records.former_names import translate_names
from rotpred.training.checkpoint import Checkpoint, CheckpointError, CheckpointFolder, load
from rotpred.training.cuda_graphs import CudaCapture, FlatGradients, Graphs
from rotpred.training.optim import build_optimizer, set_lr
from rotpred.training.precision import autocast
from rotpred.training.schedule import Schedule, lr_at
from rotpred.training.settings import Optim, RunSettings

logger = logging.getLogger(__name__)

LossAndLogs = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""The loss to minimise, and scalars by name whose means are logged; all 0-dimensional."""

LossFn = Callable[[Any], LossAndLogs]
"""A protocol's loss of a batch. It must not read from the device."""


@dataclass(frozen=True)
class OptimizedPart:
    """A part of the network with its own optimiser and schedule."""

    module: nn.Module
    optim: Optim
    schedule: Schedule


class TrainState:
    """Network, optimisers and step, with one code path for fp32, bf16 and fp16."""

    def __init__(
        self,
        module: nn.Module,
        trained: list[OptimizedPart],
        *,
        rank: Rank,
        run: RunSettings,
        folder: Path,
        global_batch: int,
        identity: dict[str, Any],
    ) -> None:
        """Wrap a network that is already on its device.

        Args:
            module: The network to train and save.
            trained: Its parts, each with optimiser and schedule; together all trainable weights.
            rank: This process.
            run: Precision, compilation, CUDA graphs, accumulation.
            folder: Folder of the checkpoints.
            global_batch: Source images per step over all ranks, for scaled learning rates.
            identity: What must match for a checkpoint to be resumed, as JSON values.

        Raises:
            ValueError: run.cuda_graph is set on a CPU.
        """
        self.rank, self.module, self.folder = rank, module, folder
        self._checkpoints = CheckpointFolder(folder, keep=run.keep_checkpoints)
        self.step = 0
        self.digest = "0"
        """`loop.stream_digest` of the samples trained on, up to the last checkpoint."""
        self._run, self._identity = run, identity
        self._epochs = run.epochs
        self._parts = [(part, part.optim.lr_for(global_batch * run.accumulate)) for part in trained]
        self._optimizers = [
            build_optimizer(part.module, part.optim, lr) for part, lr in self._parts
        ]
        # A disabled scaler does nothing: one code path for all precisions.
        self._scaler = torch.amp.GradScaler(rank.device.type, enabled=run.precision == "fp16")
        self.at_update = True
        """Whether the last step ended an accumulation, so that no gradient is pending."""
        self._sums: dict[str, torch.Tensor] = {}
        self._zero = torch.zeros((), device=rank.device)
        self._count = 0
        self._loss_not_finite = torch.zeros((), dtype=torch.bool, device=rank.device)
        self.model = module
        if run.compile:
            self.model = torch.compile(module, dynamic=False)  # type: ignore[assignment]
        self._flat: FlatGradients | None = None
        if run.cuda_graph:
            self._capture = CudaCapture(rank.device)
            self._flat = FlatGradients(module.parameters())
            self._broadcast(list(module.parameters()))
        elif rank.world > 1:
            self.model = data_parallel(self.model, rank)
        self._graphs: dict[LossFn, Graphs[LossAndLogs]] = {}

    @property
    def lr(self) -> float:
        """Learning rate of the first part in the current step."""
        return float(self._optimizers[0].param_groups[0]["lr"])

    @property
    def has_non_finite(self) -> bool:
        """Whether a loss or a weight is not finite. Waits for the device."""
        finite = [tensor.isfinite().all() for tensor in self.module.parameters()]
        return bool(self._loss_not_finite | ~torch.stack(finite).all())

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context of the run's precision."""
        return autocast(self.rank.device, self._run.precision)

    def begin_step(self, epoch: float, *, final: bool = False) -> None:
        """Set the learning rates of the next step, and whether it ends an accumulation.

        Args:
            epoch: Epochs done, with fractions.
            final: Whether this is the last step of the run, which always updates the weights.
        """
        self.at_update = final or (self.step + 1) % self._run.accumulate == 0
        if isinstance(self.model, DistributedDataParallel):
            # Average gradients once per update; `no_sync` would have to wrap the protocol's code.
            self.model.require_backward_grad_sync = self.at_update
        for optimizer, (part, lr) in zip(self._optimizers, self._parts, strict=True):
            set_lr(optimizer, lr_at(part.schedule, lr, epoch, self._epochs))

    def train_step(self, objective: LossFn, batch: tuple[Any, ...]) -> None:
        """Run forward and backward, and step the optimisers if an accumulation ends.

        Nothing here waits for the device, except the capture of a graph.

        Args:
            objective: Called with the batch or a copy of it; the same function at every step.
            batch: A named tuple or tuple. With CUDA graphs, of tensors, with the same shapes at
                every step (with progressive resolution, at every step of one resolution).
        """
        if self._flat is None:
            loss, scalars = self._gradients(objective, batch)
        else:
            if objective not in self._graphs:
                pack = getattr(type(batch), "_make", tuple)
                self._graphs[objective] = Graphs(
                    self._capture, lambda *tensors: self._gradients(objective, pack(tensors))
                )
            loss, scalars = self._graphs[objective](*batch)
        self._loss_not_finite |= ~torch.isfinite(loss)
        for name, value in scalars.items():
            # Out of place: the next step may overwrite the value itself.
            self._sums[name] = self._sums.get(name, self._zero) + value.float()
        self._count += 1
        if self.at_update:
            with record_function("optimiser"):
                self._update()

    def _gradients(self, objective: LossFn, batch: tuple[Any, ...]) -> LossAndLogs:
        with record_function("forward"):
            loss, scalars = objective(batch)
        with record_function("backward"):
            scaled = self._scaler.scale(loss / self._run.accumulate)
            scaled.backward()  # type: ignore[no-untyped-call]
        # Detached: a CUDA graph keeps its results, and must not keep the autograd graph.
        return loss.detach(), {name: value.detach() for name, value in scalars.items()}

    def _update(self) -> None:
        if self._flat is not None:
            self._flat.average(self.rank)
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        if self._flat is not None:
            self._flat.zero()
            return
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def means(self) -> dict[str, float]:
        """Return the means since the last call, on this rank. Waits for the device."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Put the network into evaluation mode for a block, without gradients.

        Batch norm statistics, which differ between ranks, become those of rank 0.
        """
        self.sync_buffers()
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    def sync_buffers(self) -> None:
        """Broadcast the buffers of rank 0 (batch norm statistics differ between ranks)."""
        self._broadcast(list(self.module.buffers()))

    @torch.no_grad()
    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        if self.rank.world == 1:
            return
        # One message per dtype: a ResNet-50 has 160 buffers.
        # A dict, not a set: the order of a set of dtypes differs between processes.
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            message = torch.cat([tensor.flatten() for tensor in alike])
            dist.broadcast(message, src=0)
            parts = torch.split(message, [tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def save(self) -> None:
        """Write a checkpoint on rank 0 while the others wait.

        Raises:
            CheckpointError: It cannot be written.
        """
        self.sync_buffers()
        if self.rank.main:
            state = {
                "arch": self._identity["backbone"],
                "model": self.module.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
                "scaler": self._scaler.state_dict(),
                "digest": self.digest,
                "rng": torch.get_rng_state(),
                "identity": json.dumps(self._identity, sort_keys=True),
            }
            self._checkpoints.save(self.step, state)
        barrier(self.rank)

    def score(self, value: float) -> None:
        """Store the score of the checkpoint that `save` has written at this step.

        Raises:
            CheckpointError: There is no such checkpoint, or its sidecar cannot be written.
        """
        if self.rank.main:
            self._checkpoints.set_score(self.step, value)
        barrier(self.rank)

    def resume(self) -> None:
        """Resume from the newest valid checkpoint in the folder, if there is one.

        Raises:
            CheckpointError: The checkpoint belongs to another run (the message lists the
                differences), or all checkpoints are damaged.
        """
        loaded: Checkpoint | None = None

        def newest() -> str:
            nonlocal loaded
            loaded = self._checkpoints.latest()
            return "" if loaded is None else str(loaded.path)

        # Rank 0 chooses. All ranks load the same file, or fail with the same message.
        found = from_main(newest, self.rank, error=CheckpointError)
        if not found:
            return
        loaded = loaded or load(Path(found))
        self._check_identity(found, translate_names(json.loads(loaded.state["identity"])))
        self.module.load_state_dict(loaded.state["model"])
        for optimizer, saved in zip(self._optimizers, loaded.state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._scaler.load_state_dict(loaded.state["scaler"])
        torch.set_rng_state(loaded.state["rng"])
        self.step, self.digest = loaded.step, loaded.state["digest"]
        logger.info("resuming from %s, after step %d", found, loaded.step)

    def _check_identity(self, path: str, saved: dict[str, Any]) -> None:
        """Raise `CheckpointError` if the identity of a checkpoint is not that of this run."""
        names = sorted(saved.keys() | self._identity.keys())
        differences = [
            f"{name}: {saved.get(name)!r} there, {self._identity.get(name)!r} now"
            for name in names
            if saved.get(name) != self._identity.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{path} belongs to another run ({'; '.join(differences)}): "
                "choose another --run.out"
            )
