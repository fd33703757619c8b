"""Exact primal solver for the linear SVM, for features with fewer dimensions than rows.

Newton's method with exact steps in the D + 1 weights (Keerthi and DeCoste, JMLR 2005).
`Kernels.fit` chooses between it and the dual solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rotpred.svm.dual import NEWTON_STEPS, TOLERANCE, line_search, normalize_rows, solve


def compact(features: npt.NDArray[np.floating], device: torch.device) -> torch.Tensor | None:
    """Return the normalised rows with the constant feature, or None if the dual solver fits better.

    With D + 1 < N the kernel is singular: at high costs, rounding moves a dual solution far from
    the exact one. In D + 1 dimensions nothing is singular, and the solver is faster.

    Args:
        features: (N, D).
        device: Device of the result.

    Returns:
        float64 (N, D + 1) if D + 1 < N, else None.
    """
    if features.shape[1] + 1 >= len(features):
        return None
    rows = normalize_rows(features)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1).to(device)


def solve_compact(
    rows: torch.Tensor, signs: torch.Tensor, weights: torch.Tensor, costs: torch.Tensor
) -> torch.Tensor:
    """Solve one problem in the primal, as `rotpred.svm.dual.solve` does in the dual.

    Args:
        rows: float64 (n, d), from `compact`.
        signs: float64 (n,), 1 or -1.
        weights: float64 (n,), multiplies C: the class weight.
        costs: float64 (m,), each positive.

    Returns:
        beta, float64 (n, m).

    Raises:
        RuntimeError: The solver does not converge, or values are not finite.
    """
    y, result = signs[:, None], []
    one = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    for cost in costs:
        c2 = (2 * weights * cost)[:, None]
        w, f = rows.new_zeros(rows.shape[1], 1), torch.zeros_like(y)
        for _ in range(NEWTON_STEPS):
            active = (y * f < 1)[:, 0]
            near, pull = rows[active], c2[active]
            beta = torch.where(active[:, None], c2 * (y - f), 0)
            gradient = w - near.T @ beta[active]
            length = torch.linalg.vector_norm(gradient)
            if not bool(torch.isfinite(length)):
                raise RuntimeError("the SVM's features or solution are not finite")
            if bool(length <= TOLERANCE * torch.linalg.vector_norm(w)):
                break
            factor = torch.linalg.cholesky(one + near.T @ (pull * near))
            step = -torch.cholesky_solve(gradient, factor)
            moved = rows @ step
            parts = (y, c2, f, moved, w * step, step * step)
            t = line_search(*(part[None] for part in parts))[0]
            w, f = w + t * step, f + t * moved
        else:
            raise RuntimeError(f"the SVM did not converge within {NEWTON_STEPS} Newton steps")
        result.append(beta)
    return torch.cat(result, 1)


@dataclass(frozen=True)
class Kernels:
    """The features of N training and M test samples, as the solvers read them."""

    train: torch.Tensor
    """float64 (N, N): `gram` of the training samples."""
    test: torch.Tensor
    """float64 (M, N): `gram` of test and training samples."""
    rows: torch.Tensor | None = None
    """float64 (N, d): `compact` of the training samples. If given, problems with fewer dimensions
    than samples use the primal solver."""

    def fit(
        self,
        chosen: torch.Tensor | None,
        signs: torch.Tensor,
        costs: torch.Tensor,
        *,
        positive_weight: float,
    ) -> torch.Tensor:
        """Solve B problems of n training samples for m costs each.

        Args:
            chosen: int64 (B, n): samples of each problem; None for one problem with all of them.
            signs: float64 (B, n), 1 or -1.
            costs: float64 (m,), each positive.
            positive_weight: Factor on the cost of positives.

        Returns:
            beta, float64 (B, n, m).

        Raises:
            RuntimeError: The solver does not converge, or values are not finite.
        """
        weights = torch.where(signs > 0, positive_weight, 1.0)
        if self.rows is not None and self.rows.shape[1] < signs.shape[1]:
            rows = self.rows[None] if chosen is None else self.rows[chosen]
            problems = zip(rows, signs, weights, strict=True)
            return torch.stack([solve_compact(*problem, costs) for problem in problems])
        if chosen is None:
            kernels = self.train[None]
        else:
            kernels = self.train[chosen[:, :, None], chosen[:, None, :]]
        return solve(kernels, signs, weights, costs)
