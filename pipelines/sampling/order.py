"""Order of samples: a pure function of (n, seed, epoch, step, rank, world).

Each epoch has one permutation, independent of the number of ranks. It is cut into global batches
of batch_size * world samples, and each rank takes its slice. A run can be resumed at any step with
another number of ranks: with the same global batch it sees the same samples.

Up to two million samples, the whole permutation is drawn. For larger data sets, a keyed bijection
computes the positions of one rank only. Drawing fourteen million numbers would cost every process
two seconds and a third of a gigabyte per epoch, mostly for the batches of other ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipelines.arrays import Bool, Int64, Uint32
from pipelines.sampling.random_bits import key64
from pipelines.spec import LoaderSpec, Shard

_MAX_DRAWN = 1 << 21  # largest permutation that is drawn whole: 60 ms, 16 MB
_BLOCK = 1 << 15  # positions computed at once: they fit into the CPU cache
_ROUNDS = 6
_SUBSET_STREAM = 0x11317  # separates the choice of a subset from the permutations of epochs


def permutation(n: int, *, seed: int, epoch: int, at: Int64 | None = None) -> Int64:
    """Return the order of n samples in an epoch: a pure function of the arguments.

    Args:
        n: Number of samples.
        seed: Key, together with the epoch.
        epoch: Counted from 0. Negative numbers are independent streams for other uses.
        at: int64 (m,), the positions to return, each in [0, n). None: all.

    Returns:
        int64 (n,), or (m,) with `at`: the sample at each position.

    Raises:
        ValueError: There are more than 2**32 samples.
    """
    if n <= _MAX_DRAWN:
        generator = np.random.Generator(np.random.Philox(key=int(key64(seed, epoch))))
        order = generator.permutation(n)
        return order if at is None else order[at]
    return bijection(np.arange(n, dtype=np.int64) if at is None else at, n, seed, epoch)


def bijection(x: Int64, n: int, *key: int) -> Int64:
    """Apply a keyed bijection of [0, n), for n up to 2**32.

    A Feistel network on pairs of quotient and remainder (Black and Rogaway, CT-RSA 2002). There are
    up to sqrt(n) more pairs than n. A result of n or more is passed through the network again.

    Args:
        x: int64 (m,), numbers in [0, n).
        n: Size of the domain.
        *key: The key.

    Returns:
        int64 (m,), numbers in [0, n).

    Raises:
        ValueError: n is above 2**32.
    """
    if n > 1 << 32:
        raise ValueError(f"an order has at most {1 << 32} samples, not {n}")
    moduli = (math.isqrt(n - 1) + 1, -(-n // (math.isqrt(n - 1) + 1)))
    keys = [np.uint32(key64(*key, 0xFE157, i) >> np.uint64(32)) for i in range(_ROUNDS)]
    out = np.empty(len(x), np.int64)
    for start in range(0, len(x), _BLOCK):
        block = _feistel(x[start : start + _BLOCK], moduli, keys)
        while len(beyond := np.flatnonzero(block >= n)):
            block[beyond] = _feistel(block[beyond], moduli, keys)
        out[start : start + _BLOCK] = block
    return out


def _feistel(x: Int64, moduli: tuple[int, int], keys: list[np.uint32]) -> Int64:
    """Pass x through the network once. Its domain is [0, moduli[0] * moduli[1]), both <= 2**16."""
    halves = [half.astype(np.uint32) for half in np.divmod(x, moduli[1])]
    for i, key in enumerate(keys):
        moved, modulus = halves[i % 2], np.uint32(moduli[i % 2])
        noise = _mix32(halves[1 - i % 2] ^ key)
        # Scale the upper 16 bits of the hash to the modulus. A division would dominate the time.
        noise >>= np.uint32(16)
        noise *= modulus
        noise >>= np.uint32(16)
        moved += noise
        np.subtract(moved, modulus, out=noise)  # wraps to a huge number if moved < modulus
        np.minimum(moved, noise, out=moved)
    return halves[0].astype(np.int64) * moduli[1] + halves[1]


def _mix32(x: Uint32) -> Uint32:
    """Hash 32-bit words in place (C. Wellons, "Prospecting for Hash Functions", 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return x


def draw_balanced(labels: Int64, count: int, *, seed: int) -> Int64:
    """Draw the same number of samples from every class: a pure function of the arguments.

    Args:
        labels: int64 (n,), class ids.
        count: Samples per class.
        seed: Decides which. With the same seed, a larger count contains a smaller one.

    Returns:
        int64 (classes * count,), sorted sample indices.

    Raises:
        ValueError: A sample has no label, or a class has fewer samples.
    """
    if labels.min() < 0:
        raise ValueError("samples_per_class needs a label for every sample")
    sizes = np.bincount(labels)
    small = np.flatnonzero((sizes > 0) & (sizes < count))
    if len(small):
        raise ValueError(
            f"samples_per_class={count}: class {small[0]} has {sizes[small[0]]} samples only"
        )
    order = permutation(len(labels), seed=seed, epoch=-_SUBSET_STREAM)
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = (np.cumsum(sizes) - sizes)[sizes > 0]
    return np.sort(by_class[(starts[:, None] + np.arange(count)).reshape(-1)])


@dataclass(frozen=True)
class Order:
    """The batches of one rank: sample indices, epoch by epoch."""

    n: int
    """Samples in the data set, before `max_samples` and `samples_per_class`."""
    spec: LoaderSpec
    shard: Shard
    labels: Int64 | None = None
    """int64 (n,): class ids. Needed for `samples_per_class` only."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"{self.spec.data}: the data set is empty")
        if self.steps == 0:
            raise ValueError(
                f"{self.spec.data}: {self.size} samples do not fill one global batch of "
                f"{self.global_batch} ({self.spec.batch_size} x {self.shard.world} processes); "
                "use a smaller batch_size or drop_last=False"
            )

    @property
    def size(self) -> int:
        """Samples in use, after `max_samples` and `samples_per_class`."""
        return self.n if self._chosen is None else len(self._chosen)

    @cached_property
    def _chosen(self) -> Int64 | None:
        """The samples in use, sorted. None: all."""
        spec = self.spec
        if spec.samples_per_class is not None:
            if self.labels is None:
                raise ValueError("samples_per_class needs labels")
            return draw_balanced(self.labels, spec.samples_per_class, seed=spec.seed)
        if spec.max_samples is None or spec.max_samples >= self.n:
            return None
        first = np.arange(spec.max_samples, dtype=np.int64)
        return np.sort(permutation(self.n, seed=spec.seed, epoch=-_SUBSET_STREAM, at=first))

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.spec.batch_size * self.shard.world

    @property
    def steps(self) -> int:
        """Steps per epoch, the same on every rank."""
        if self.spec.drop_last:
            return self.size // self.global_batch
        return -(-self.size // self.global_batch)

    def samples(self, epoch: int, at: Int64 | None = None) -> Int64:
        """Return the sample indices of an epoch over all ranks, in order.

        Args:
            epoch: Counted from 0.
            at: int64 (m,), the positions to return, each in [0, size). None: all.

        Returns:
            int64 (size,), or (m,) with `at`.
        """
        seed, size = self.spec.seed, self.size
        if self.spec.shuffle:
            at = permutation(size, seed=seed, epoch=epoch, at=at)
        elif at is None:
            at = np.arange(size, dtype=np.int64)
        return at if self._chosen is None else self._chosen[at]

    def batches(self, epoch: int, start_step: int = 0) -> tuple[Int64, Bool]:
        """Return this rank's sample indices for the steps from `start_step` on.

        Returns:
            Indices, int64 (steps - start_step, B), and validity, bool of the same shape. Padding
            repeats the last sample of the epoch and is not valid.

        Raises:
            ValueError: `start_step` is not in [0, steps].
        """
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step {start_step} is not in an epoch of {self.steps} steps")
        size = self.spec.batch_size
        first = np.arange(start_step, self.steps, dtype=np.int64) * self.global_batch
        positions = (first + self.shard.rank * size)[:, None] + np.arange(size)
        valid = positions < self.size
        np.minimum(positions, self.size - 1, out=positions)
        return self.samples(epoch, positions.reshape(-1)).reshape(positions.shape), valid
