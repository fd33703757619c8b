"""Order of images of variable size, for each rank.

Pure functions of the data set, the seed and the step, like `pipelines.sampling.order`. In training,
landscape and portrait images form separate batches, as in torchvision's and detectron2's reference
code, which reduces padding. Groups alternate in proportion to their sizes, so that all images are
used equally often. A global batch is from one group: it does not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.arrays import Bool, Int64
from pipelines.sampling.order import permutation
from pipelines.spec import Shard


class BatchIndices(NamedTuple):
    """Images of a batch of one rank."""

    indices: Int64
    """(B,): positions in the data set."""
    passes: Int64
    """(B,): earlier passes over the group of each image in training; 0 in evaluation."""
    valid: Bool
    """(B,): False for padding."""


def by_shape(sizes: Int64) -> tuple[Int64, ...]:
    """Group images: landscape and square ones, then portrait ones. Omits empty groups.

    Args:
        sizes: int64 (N, 2), heights and widths.

    Returns:
        For each group int64 (n,), ascending positions.
    """
    portrait = sizes[:, 0] > sizes[:, 1]
    groups = (np.flatnonzero(~portrait), np.flatnonzero(portrait))
    return tuple(group.astype(np.int64) for group in groups if len(group))


@dataclass(frozen=True)
class EndlessOrder:
    """Order of training: an endless sequence of batches."""

    groups: tuple[Int64, ...]
    """Positions of images that may share a batch, int64 (n,) each; one or two groups."""
    batch_size: int
    """Images per batch and rank."""
    shard: Shard
    seed: int

    def at(self, step: int) -> BatchIndices:
        """Return the batch of a step, counted over all epochs.

        Each pass over a group has a new permutation. A batch may contain the end of one pass and
        the start of the next.
        """
        group, turn = self._group_of_step(step)
        chosen = self.groups[group]
        first = (turn * self.shard.world + self.shard.rank) * self.batch_size
        passes, rows = np.divmod(first + np.arange(self.batch_size), len(chosen))
        indices = np.empty(self.batch_size, np.int64)
        for number in np.unique(passes):
            here = passes == number
            epoch = int(number) * len(self.groups) + group
            order = permutation(len(chosen), seed=self.seed, epoch=epoch, at=rows[here])
            indices[here] = chosen[order]
        return BatchIndices(indices, passes, np.ones(self.batch_size, bool))

    def _group_of_step(self, step: int) -> tuple[int, int]:
        """Return the group of a step, and the number of earlier steps of that group."""
        if len(self.groups) == 1:
            return 0, step
        second, total = len(self.groups[1]), sum(map(len, self.groups))
        before = step * second // total
        if (step + 1) * second // total > before:
            return 1, before
        return 0, step - before


@dataclass(frozen=True)
class SinglePassOrder:
    """Order of evaluation: every image once, in the order of the data set."""

    n: int
    batch_size: int
    shard: Shard

    @property
    def steps(self) -> int:
        """Number of steps, the same on every rank."""
        return -(-self.n // (self.batch_size * self.shard.world))

    def at(self, step: int) -> BatchIndices:
        """Return the batch of a step. Padding repeats the last image and is not valid."""
        first = (step * self.shard.world + self.shard.rank) * self.batch_size
        indices = first + np.arange(self.batch_size, dtype=np.int64)
        valid = indices < self.n
        return BatchIndices(np.minimum(indices, self.n - 1), np.zeros_like(indices), valid)
