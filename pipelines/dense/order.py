"""Which images of variable size, in which order, on which rank.

Pure functions of the data set, the seed and the step, like `pipelines.sampling.order`. In training, lying
and standing images come in batches of their own, as in torchvision's and detectron2's references,
for which less is padded. Groups take turns in proportion to their sizes, so that all images come
equally often. A batch over all ranks is of one group: it does not depend on their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.arrays import Int64
from pipelines.sampling.order import permutation
from pipelines.spec import Shard


class Places(NamedTuple):
    """A batch of one rank."""

    indices: Int64
    """(B,): images."""
    passes: Int64
    """(B,): how often each has come before in training; 0 in evaluation."""
    valid: npt.NDArray[np.bool_]
    """(B,): False for padding."""


def by_shape(sizes: Int64) -> tuple[Int64, ...]:
    """Lying and square images, then standing ones; groups without images are left out.

    Args:
        sizes: int64 (N, 2), heights and widths.

    Returns:
        int64 positions, rising, of each group.
    """
    standing = sizes[:, 0] > sizes[:, 1]
    groups = (np.flatnonzero(~standing), np.flatnonzero(standing))
    return tuple(group.astype(np.int64) for group in groups if len(group))


@dataclass(frozen=True)
class EndlessOrder:
    """Training: one batch after the other, for ever."""

    groups: tuple[Int64, ...]
    """Images that may share a batch; one or two groups."""
    batch_size: int
    """On one rank."""
    shard: Shard
    seed: int

    def at(self, step: int) -> Places:
        """The batch of a step, counted over all epochs.

        A group's images come in a new permutation in each pass over it; a batch may hold the end
        of one and the begin of the next.
        """
        group, turn = self._turn(step)
        chosen = self.groups[group]
        first = (turn * self.shard.world + self.shard.rank) * self.batch_size
        passes, rows = np.divmod(first + np.arange(self.batch_size), len(chosen))
        indices = np.empty(self.batch_size, np.int64)
        for number in np.unique(passes):
            here = passes == number
            epoch = int(number) * len(self.groups) + group
            order = permutation(len(chosen), seed=self.seed, epoch=epoch, at=rows[here])
            indices[here] = chosen[order]
        return Places(indices, passes, np.ones(self.batch_size, bool))

    def _turn(self, step: int) -> tuple[int, int]:
        """The group of a step, and how many steps before it were of that group."""
        if len(self.groups) == 1:
            return 0, step
        second, total = len(self.groups[1]), sum(map(len, self.groups))
        before = step * second // total
        if (step + 1) * second // total > before:
            return 1, before
        return 0, step - before


@dataclass(frozen=True)
class SinglePassOrder:
    """Evaluation: every image once, in order."""

    n: int
    batch_size: int
    shard: Shard

    @property
    def steps(self) -> int:
        """The same on every rank."""
        return -(-self.n // (self.batch_size * self.shard.world))

    def at(self, step: int) -> Places:
        """The batch of a step; the last image again, not valid, where there is none."""
        first = (step * self.shard.world + self.shard.rank) * self.batch_size
        indices = first + np.arange(self.batch_size, dtype=np.int64)
        valid = indices < self.n
        return Places(np.minimum(indices, self.n - 1), np.zeros_like(indices), valid)
