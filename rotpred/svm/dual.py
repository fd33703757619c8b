"""Exact dual solver for the linear SVM of the VOC07 protocol, batched over problems and costs.

The objective is that of scikit-learn's `LinearSVC` (liblinear: L2 penalty, squared hinge; the bias
is one more penalised weight, on a constant feature of 1):

    |w|^2 / 2 + sum_i C_i max(0, 1 - y_i f_i)^2,    f_i = w.x_i + b,    C_i = C * weight_i

The optimal (w, b) is a combination of the training rows. So the problem has n dimensions, not the
thousands of a feature: f = K beta with K = X X' + 1, computed once for all classes, folds and
costs. Newton's method on the squared hinge is exact once the set of rows within the margin no
longer changes, after a few iterations (Keerthi and DeCoste, JMLR 2005; Chapelle, Neural Computation
2007). Each iteration solves a linear system. Low costs have many active rows and are well
conditioned: conjugate gradients solve all of them at once. High costs have few: a Cholesky factor
solves each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

TOLERANCE = 1e-7
"""Greatest distance of a solution from the exact one, relative to |(w, b)|; see `solve`."""

NEWTON_STEPS = 100
"""Limit on iterations, after which the solvers raise."""

_CG_STEPS = 80
_CG_GAIN = 0.05
_TINY = 1e-300
_ROUNDING = 8 * torch.finfo(torch.float64).eps
"""Rounding error of gradient' K gradient relative to |gradient|^2, for rows of unit length."""
_DIRECT_SHARE = 0.6
"""Below this share of active rows a Cholesky factor is cheaper than conjugate gradients."""


def normalize_rows(features: npt.NDArray[np.floating]) -> torch.Tensor:
    """Return x / (|x| + 1e-5) per row of (N, D), as published: float64 (N, D) on the CPU."""
    x = torch.from_numpy(np.asarray(features, np.float64))
    lengths: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / (lengths + 1e-5)


def gram(
    rows: npt.NDArray[np.floating], columns: npt.NDArray[np.floating], device: torch.device
) -> torch.Tensor:
    """Return K = A B' + 1 of the normalised features, float64 (N, M).

    A is `rows` (N, D), B is `columns` (M, D). The 1 is the constant feature of the bias. Works in
    blocks: a float64 copy of all features would be the largest array of the protocol.
    """
    block = 512
    result = torch.empty(len(rows), len(columns), dtype=torch.float64, device=device)
    for j in range(0, len(columns), 2 * block):
        right = normalize_rows(columns[j : j + 2 * block]).to(device)
        for i in range(0, len(rows), block):
            left = normalize_rows(rows[i : i + block]).to(device)
            result[i : i + block, j : j + 2 * block] = left @ right.T + 1
    return result


def solve(
    kernel: torch.Tensor, signs: torch.Tensor, weights: torch.Tensor, costs: torch.Tensor
) -> torch.Tensor:
    """Solve B problems of n rows for m costs each.

    The result satisfies |(w, b) - exact| <= TOLERANCE * |(w, b)|: the objective is 1-strongly
    convex, so the norm of its gradient bounds the distance to the minimum. The error of a decision
    value of a unit row is at most twice that.

    Args:
        kernel: float64 (B, n, n), from `gram`.
        signs: float64 (B, n), 1 or -1.
        weights: float64 (B, n), multiplies C: the class weight.
        costs: float64 (m,), each positive.

    Returns:
        beta, float64 (B, n, m): decision values of any rows are `gram(rows, training) @ beta`.

    Raises:
        RuntimeError: The solver does not converge, or values are not finite.
    """
    y = signs[:, :, None]
    every_c2 = 2 * weights[:, :, None] * costs
    solution = torch.zeros_like(every_c2)
    live = torch.arange(len(costs), device=costs.device)
    c2, beta, f = every_c2, solution.clone(), solution.clone()
    slow = torch.zeros(len(kernel), len(costs), dtype=torch.bool, device=kernel.device)
    for _ in range(NEWTON_STEPS):
        active = y * f < 1
        gradient = beta - torch.where(active, c2 * (y - f), 0)
        k_gradient = kernel @ gradient
        # Norms in the space of (w, b): |(w, b)|^2 = beta' K beta.
        square = (gradient * k_gradient).sum(1)
        hidden = _ROUNDING * (gradient * gradient).sum(1)
        distance = (square.clamp_min(0) + hidden).sqrt()
        if not bool(torch.isfinite(distance).all()):
            raise RuntimeError("the SVM's kernel or solution is not finite")
        accepted = TOLERANCE * (beta * f).sum(1).clamp_min(0).sqrt()
        todo = distance > accepted
        solution[:, :, live] = beta
        # Products with K take the time: drop the costs that are solved for every problem.
        keep = todo.any(0)
        if not bool(keep.any()):
            return solution
        live, todo, slow = live[keep], todo[:, keep], slow[:, keep]
        c2, beta, f, active, gradient, k_gradient = (
            part[:, :, keep] for part in (c2, beta, f, active, gradient, k_gradient)
        )
        # If K is singular (more rows than features), conjugate gradients leave a large part of the
        # gradient in the null space of K. It changes no decision value, but its rounding error
        # hides the rest.
        blind = todo & (square[:, keep] <= hidden[:, keep])
        direct = todo & (slow | (active.sum(1) < kernel.shape[1] * _DIRECT_SHARE))
        step = torch.zeros_like(beta)
        used = todo & ~direct
        columns = used.any(0).nonzero()[:, 0]
        if len(columns):
            goal = torch.where(blind, accepted[:, keep] / 2, _CG_GAIN * distance[:, keep]) ** 2
            found, done = _conjugate_gradients(
                kernel,
                torch.where(active, c2, 0)[:, :, columns],
                gradient[:, :, columns],
                k_gradient[:, :, columns],
                blind[:, None, columns],
                goal[:, None, columns],
            )
            step[:, :, columns] = torch.where(used[:, None, columns], found, 0)
            slow[:, columns] |= used[:, columns] & ~done
        for i, column in direct.nonzero().tolist():
            rows = active[i, :, column].nonzero()[:, 0]
            step[i, :, column] = -beta[i, :, column]
            step[i, rows, column] += _on_active(kernel[i], signs[i], c2[i, :, column], rows)
        k_step = kernel @ step
        t = line_search(y, c2, f, k_step, step * f, step * k_step)
        slow |= todo & (t[:, 0] == 0)
        beta, f = beta + t * step, f + t * k_step
    raise RuntimeError(f"the SVM did not converge within {NEWTON_STEPS} Newton steps")


def _on_active(
    kernel: torch.Tensor, signs: torch.Tensor, c2: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Solve (K + 1/c2) beta = y over the active rows of one problem, the others being 0."""
    system = kernel[rows][:, rows]
    system.diagonal().add_(1 / c2[rows])
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(signs[rows, None], factor)[:, 0]


def _conjugate_gradients(
    kernel: torch.Tensor,
    curvature: torch.Tensor,
    gradient: torch.Tensor,
    k_gradient: torch.Tensor,
    blind: torch.Tensor,
    goal: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve (1 + S K) step = -gradient for all columns, with S the diagonal matrix of curvatures.

    Conjugate gradients in the inner product u' K v, which is that of (w, b). In it the system is
    symmetric with eigenvalues of at least 1, and every iterate is a descent direction. K times each
    vector is kept, so that an iteration costs one product with K.

    Columns in `blind` (B, 1, m) start from -gradient instead of 0. That solves the part in the null
    space of K exactly; this inner product cannot see it.

    Returns:
        The steps (B, n, m), and bool (B, m): whether the residual's squared norm is at most `goal`
        (B, 1, m).
    """
    step = torch.where(blind, -gradient, 0)
    residual = torch.where(blind, curvature * k_gradient, -gradient)
    k_residual = kernel @ residual if bool(blind.any()) else -k_gradient
    direction, k_direction = residual, k_residual
    square = (residual * k_residual).sum(1, keepdim=True).clamp_min(0)
    for _ in range(_CG_STEPS):
        if bool((square <= goal).all()):
            break
        bent = curvature * k_direction
        image, k_image = direction + bent, k_direction + kernel @ bent
        bend = (direction * k_image).sum(1, keepdim=True)
        # Solved problems stay as they are: only rounding error is left in them, and a quotient of
        # two such numbers need not be finite.
        rate = torch.where((square > goal) & (bend > 0), square / bend.clamp_min(_TINY), 0)
        step = step + rate * direction
        residual, k_residual = residual - rate * image, k_residual - rate * k_image
        following = (residual * k_residual).sum(1, keepdim=True).clamp_min(0)
        turn = torch.where(rate > 0, following / square.clamp_min(_TINY), 0)
        direction = residual + turn * direction
        k_direction = k_residual + turn * k_direction
        square = following
    return step, (square <= goal)[:, 0]


def line_search(
    y: torch.Tensor,
    c2: torch.Tensor,
    f: torch.Tensor,
    moved: torch.Tensor,
    forward: torch.Tensor,
    curved: torch.Tensor,
) -> torch.Tensor:
    """Return the t (B, 1, m) in 0..1 that minimises the objective along each step.

    Its derivative increases with t and is piecewise linear: bisection, down to rounding.

    Args:
        y: Signs, float64 (B, n, 1).
        c2: 2 * weight * cost, float64 (B, n, m).
        f: Decision values (B, n, m).
        moved: Change of the decision values by the whole step (B, n, m).
        forward: Terms (B, d, m) whose sum over d is the inner product of (w, b) with the step.
        curved: Terms (B, d, m) whose sum over d is the inner product of the step with itself.
    """
    along, curvature = forward.sum(1, keepdim=True), curved.sum(1, keepdim=True)
    pull = c2 * moved

    def loss(t: torch.Tensor) -> torch.Tensor:
        inside = y - f - t * moved
        return (pull * torch.where(y * inside > 0, inside, 0)).sum(1, keepdim=True)

    def slope(t: torch.Tensor) -> torch.Tensor:
        return along + t * curvature - loss(t)

    low, high = torch.zeros_like(along), torch.ones_like(along)
    # The last Newton steps have t = 1. It is too far only if the slope there is clearly positive,
    # compared with the terms of its sums, which cancel: a step that corrects beta in the null space
    # of a singular K moves no decision value, and its sums are rounding error.
    terms = (forward, curved, pull * (y - f - moved))
    size = sum(part.abs().sum(1, keepdim=True) for part in terms)
    far = slope(high) > 1e-10 * size
    if not bool(far.any()):
        return high
    for _ in range(30):
        middle = (low + high) / 2
        above = slope(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(far, low, 1.0)
