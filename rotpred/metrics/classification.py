"""Classification metrics: top-k accuracy and confusion matrices.

A metric is one integer tensor of counts on the device. Invalid samples count nothing. `compute`
sums over ranks, reads back and divides; `update` does none of that. So results are exact for any
number of ranks and any padding, and an update never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rotpred.distributed import Rank, all_sum


class TopK:
    """Top-k accuracy of one or several classifiers (probes) on the same targets.

    `sums` is int64 (heads, len(ks) + 2): hits for each k, valid samples, and valid samples whose
    target is not a class (the data set is broken, and `compute` raises).
    """

    def __init__(
        self,
        *,
        ks: Sequence[int] = (1, 5),
        heads: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start at zero.

        Args:
            ks: Each at least 1 and at most the number of classes.
            heads: Number of classifiers.
            device: Device of the logits.
        """
        self.ks = tuple(ks)
        self.sums = torch.zeros(heads, len(self.ks) + 2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(
        self,
        logits: torch.Tensor | Sequence[torch.Tensor],
        targets: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Count a batch.

        Args:
            logits: Float (N, classes), or one such tensor per head.
            targets: int64 (N,); any value where not valid.
            valid: bool (N,).

        Raises:
            ValueError: The number of heads is wrong, or there are fewer classes than the largest k.
        """
        outputs = [logits] if isinstance(logits, torch.Tensor) else logits
        if len(outputs) != len(self.sums):
            raise ValueError(f"{len(outputs)} tensors of logits for {len(self.sums)} heads")
        for head, output in enumerate(outputs):
            classes = output.shape[1]
            if classes < max(self.ks):
                raise ValueError(f"top-{max(self.ks)} needs more than {classes} classes")
            best = output.topk(max(self.ks), dim=1).indices
            hit = (best == targets[:, None]) & valid[:, None]
            outside = valid & ((targets < 0) | (targets >= classes))
            counts = [hit[:, :k].sum() for k in self.ks]
            self.sums[head] += torch.stack([*counts, valid.sum(), outside.sum()])

    def compute(self, rank: Rank) -> list[dict[str, float]]:
        """Return {"top1": share, ..., "n": valid samples} per head; shares are from 0 to 1.

        Args:
            rank: This process. Counts are summed over all ranks first, and every rank must call.

        Raises:
            ValueError: No valid sample was counted, or a valid target is not a class.
        """
        sums = all_sum(self.sums, rank).tolist()
        results = []
        for *hits, n, outside in sums:
            if n == 0:
                raise ValueError("no valid sample was counted")
            if outside:
                raise ValueError(f"{outside} of {n} valid targets are not among the classes")
            shares = {f"top{k}": hit / n for k, hit in zip(self.ks, hits, strict=True)}
            results.append({**shares, "n": float(n)})
        return results


@dataclass(frozen=True)
class ConfusionResult:
    """A confusion matrix and its ratios, from 0 to 1; None for a class that never occurred."""

    matrix: list[list[int]]
    """Row: target, column: prediction."""
    n: int
    """Number of valid samples or pixels."""
    accuracy: float
    """Share of all samples that are correct."""
    recall: list[float | None]
    """Per class: correct / targets."""
    mean_recall: float
    """Mean over classes that occur as targets."""
    iou: list[float | None]
    """Per class: correct / (targets + predictions - correct)."""
    mean_iou: float
    """Mean over classes that occur as targets or predictions."""


class Confusion:
    """Confusion matrix of n classes, for rotations or for pixels (accuracy, mean IoU).

    `sums` is int64 (n * n + 1,): the count of each [target * n + prediction]; last, the valid
    samples whose target or prediction is not a class (`compute` then raises).
    """

    def __init__(self, n: int, *, device: torch.device | str = "cpu") -> None:
        """Start at zero."""
        self.n = n
        self.sums = torch.zeros(n * n + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, predictions: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> None:
        """Count a batch.

        Args:
            predictions: Integers of any shape, (N,) or (N, H, W).
            targets: Integers of the same shape; any value where not valid.
            valid: bool of the same shape.

        Raises:
            ValueError: The shapes differ.
        """
        if not predictions.shape == targets.shape == valid.shape:
            raise ValueError(
                f"shapes differ: predictions {tuple(predictions.shape)}, targets "
                f"{tuple(targets.shape)}, valid {tuple(valid.shape)}"
            )
        n = self.n
        known = (targets >= 0) & (targets < n) & (predictions >= 0) & (predictions < n)
        cell = torch.where(known, targets.long() * n + predictions.long(), n * n)
        # Not bincount: on a GPU it reads back its maximum, even if minlength is given.
        self.sums.scatter_add_(0, cell.flatten(), valid.flatten().long())

    def compute(self, rank: Rank) -> ConfusionResult:
        """Return the matrix and its ratios.

        Args:
            rank: This process. Counts are summed over all ranks first, and every rank must call.

        Raises:
            ValueError: No valid sample was counted, or a valid target or prediction is not a class.
        """
        sums = all_sum(self.sums, rank).cpu()
        outside = int(sums[-1])
        matrix = sums[:-1].view(self.n, self.n)
        total = int(matrix.sum())
        if outside:
            raise ValueError(f"{outside} valid targets or predictions are not among the classes")
        if total == 0:
            raise ValueError("no valid sample was counted")
        correct = matrix.diagonal().tolist()
        actual, predicted = matrix.sum(1).tolist(), matrix.sum(0).tolist()
        recall = [r / a if a else None for r, a in zip(correct, actual, strict=True)]
        unions = [a + p - r for r, a, p in zip(correct, actual, predicted, strict=True)]
        iou = [r / u if u else None for r, u in zip(correct, unions, strict=True)]
        return ConfusionResult(
            matrix=matrix.tolist(),
            n=total,
            accuracy=sum(correct) / total,
            recall=recall,
            mean_recall=_mean(recall),
            iou=iou,
            mean_iou=_mean(iou),
        )


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
