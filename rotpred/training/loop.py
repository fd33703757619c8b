"""The training loop: epoch, resume point, learning rate, log and checkpoint cadence, signals.

`steps` yields batches. Each protocol defines its loss and calls `train_step` in its own file:

    def objective(batch):
        with state.autocast():
            loss = cross_entropy(state.model(batch.images), batch.targets)
        return loss, {"loss": loss}

    for batch in steps(state, loader, run, log=log):
        state.train_step(objective, batch)

The loop reads nothing from the device in a step. (torch's SyncBN does in every layer, and so do
detection's proposals.) At each log line the sums that `state.train_step` has gathered are read, and
all ranks agree on whether a signal has arrived or a loss was not finite.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import torch

from rotpred.distributed import Rank, all_sum, any_true
from rotpred.records.log import RunLog
from rotpred.training.loader_interface import TrainingLoader
from rotpred.training.profiler import profiled
from rotpred.training.settings import RunSettings
from rotpred.training.state import TrainState

B = TypeVar("B")

STOP_STATUS = 75
"""Exit status of a run that a signal ended after a checkpoint (BSD's EX_TEMPFAIL: try again)."""

_AGREE_EVERY = 10  # steps between checks whether any rank got a signal, on GPUs
_PATIENCE_SECONDS = 5.0
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stopped(Exception):
    """The run was stopped by a signal, after writing a checkpoint at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}; a checkpoint was written")
        self.step = step


class NotFiniteError(ValueError):
    """A loss or a weight is infinite or NaN. No checkpoint holds such weights."""


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Handle signals in a block; the function that it yields returns whether one has arrived.

    Job schedulers signal every process and torchrun forwards signals, so one request may arrive
    twice in short succession. A user who signals again after a wait wants to stop at once.
    """
    first: float | None = None

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > _PATIENCE_SECONDS:
            raise KeyboardInterrupt(f"signal {number}, again")

    before = {number: signal.signal(number, handle) for number in _STOPPING}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def steps(
    state: TrainState,
    loader: TrainingLoader[B],
    run: RunSettings,
    *,
    log: RunLog,
    evaluate: Callable[[int], float] | None = None,
    eval_every_epochs: int = 1,
) -> Iterator[B]:
    """Yield the batches of a run, from the step of `state` to the end.

    Args:
        state: The training state; its `step` is where to resume.
        loader: Training data.
        run: Length of the run, and how often to log and save.
        log: Log of the run.
        evaluate: Called with the number of finished epochs, after every `eval_every_epochs`-th
            epoch and the last one. The checkpoint with the highest score returned is the best one.
        eval_every_epochs: Epochs between evaluations.

    Raises:
        NotFiniteError: A loss or a weight is not finite. Raised on all ranks together, at the next
            log line or before the next checkpoint.
        Stopped: A signal has arrived. Raised on all ranks together, after a checkpoint.
        RuntimeError: The loader ended an epoch early.
    """
    per_epoch = len(loader)
    last = run.total_steps(per_epoch)
    meter = _Meter(state, loader, log, run)
    # The checkpoint holds the sum over ranks: rank 0 continues it, the others start at 0.
    loader.digest = int(state.digest, 16) if state.rank.main else 0
    # On GPUs the hosts run ahead of the devices: fewer checks keep them from waiting.
    agree_every = 1 if state.rank.device.type == "cpu" else _AGREE_EVERY

    saved = -1

    def save() -> None:
        nonlocal saved
        if state.step == saved:
            return
        meter.check_finite()
        state.digest = stream_digest(loader, state.rank)
        state.save()
        saved = state.step

    def stop_if_asked() -> None:
        if any_true(arrived(), state.rank):
            save()
            raise Stopped(state.step)

    traced = run.profile if state.rank.main else 0
    with (
        _signals() as arrived,
        profiled(log.out / "profile", traced, state.rank.device) as profile_step,
    ):
        while state.step < last:
            epoch, start = divmod(state.step, per_epoch)
            save_due = agree_due = False
            with contextlib.closing(loader.epoch(epoch, start_step=start)) as batches:
                for batch in batches:
                    state.begin_step(state.step / per_epoch, final=state.step + 1 == last)
                    yield batch
                    state.step += 1
                    profile_step()
                    log.tick(state.step)
                    ended = state.step == last or state.step % per_epoch == 0
                    if ended or state.step % run.log_every_steps == 0:
                        meter.report(epoch)
                    if ended:
                        break
                    save_due |= state.step % run.save_every_steps == 0
                    agree_due |= state.step % agree_every == 0
                    # Not within an accumulation: a checkpoint has no place for partial gradients.
                    if state.at_update and agree_due:
                        agree_due = False
                        stop_if_asked()
                    if state.at_update and save_due:
                        save_due = False
                        save()
                else:
                    raise RuntimeError(f"{loader.engine} ended epoch {epoch} at step {state.step}")
            # Before the validation, which may take longer than the time left after a signal.
            if state.at_update:
                save()
            finished, rest = divmod(state.step, per_epoch)
            due = rest == 0 and (finished % eval_every_epochs == 0 or finished == run.epochs)
            if evaluate is not None and due:
                score = evaluate(finished)
                if state.at_update:
                    state.score(score)
            if state.at_update and state.step < last:
                stop_if_asked()
            meter.restart()


class _Meter:
    """Throughput and mean losses between two log lines."""

    def __init__(
        self, state: TrainState, loader: TrainingLoader[object], log: RunLog, run: RunSettings
    ) -> None:
        self._state, self._loader, self._log, self._run = state, loader, log, run
        self.restart()

    def restart(self) -> None:
        """Start an interval now: an evaluation before it does not count as training time."""
        self._step = self._state.step
        self._began, self._waited = time.perf_counter(), self._loader.wait_seconds

    def report(self, epoch: int) -> None:
        """Read the sums from the device and log them; raise if a loss was not finite."""
        means = self._state.means()
        self.check_finite()
        steps_done = self._state.step - self._step
        spec = self._loader.spec
        self._log.interval(
            step=self._state.step,
            epoch=epoch,
            values={**means, "lr": self._state.lr, **spec.scalars(epoch)},
            images=steps_done * spec.batch_size,
            views=steps_done * spec.batch_size * spec.view_count,
            wait_seconds=self._loader.wait_seconds - self._waited,
            seconds=time.perf_counter() - self._began,
        )
        self.restart()

    def check_finite(self) -> None:
        """Raise `NotFiniteError` on all ranks if a loss or a weight of any is not finite."""
        if any_true(self._state.has_non_finite, self._state.rank):
            raise NotFiniteError(
                f"the loss or a weight was not finite at step {self._state.step}: a smaller "
                "learning rate, a longer warm-up or precision fp32 may help; "
                "the last checkpoint is not affected"
            )


def stream_digest(loader: TrainingLoader[object], rank: Rank) -> str:
    """Return a hash of all (epoch, index, crop box) trained on; equal runs have equal digests."""
    # Addition in two's complement wraps exactly like unsigned addition.
    signed = loader.digest - 2**64 if loader.digest >= 2**63 else loader.digest
    total = int(all_sum(torch.tensor(signed, dtype=torch.int64), rank))
    return f"{total % 2**64:016x}"
