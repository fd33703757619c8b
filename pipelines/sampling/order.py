"""Which samples, in which order, on which rank: pure functions of (n, seed, epoch, step, world).

The order does not depend on the world: one permutation of the epoch is cut into global batches of
batch_size * world samples, and each rank takes its slice. Stopping at any step and going on with
another number of ranks (and the same global batch) meets the same samples.

Up to two million samples the permutation is drawn. Of a larger data set, a rank computes its own
places only, by a keyed bijection: drawing fourteen million numbers would cost every process two
seconds and a third of a gigabyte per epoch, most of it for other ranks' batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipelines.arrays import Int64, Uint32
from pipelines.sampling.random_bits import key64
from pipelines.spec import LoaderSpec, Shard

_DRAWN = 1 << 21  # samples up to which the permutation is drawn whole: 60 ms, 16 MB
_BLOCK = 1 << 15  # places computed at once: their words stay in the cache
_ROUNDS = 6
_LIMIT_STREAM = 0x11317  # keeps the draw of `max_samples` apart from every epoch's permutation


def permutation(n: int, *, seed: int, epoch: int, at: Int64 | None = None) -> Int64:
    """The order of n samples in an epoch: a pure function of the arguments.

    Args:
        n: How many samples.
        seed: With the epoch, the key.
        epoch: Counted from 0; negative numbers are streams for other uses.
        at: (m,): the places of the order to return, each in [0, n); None returns all.

    Returns:
        int64 (n,), or (m,) with `at`: which sample stands at each place.
    """
    if n <= _DRAWN:
        generator = np.random.Generator(np.random.Philox(key=int(key64(seed, epoch))))
        order = generator.permutation(n)
        return order if at is None else order[at]
    return bijection(np.arange(n, dtype=np.int64) if at is None else at, n, seed, epoch)


def bijection(x: Int64, n: int, *key: int) -> Int64:
    """Where a keyed bijection of [0, n) sends each x in [0, n), for n up to 2**32.

    A Feistel network on pairs of a quotient and a remainder (Black and Rogaway, CT-RSA 2002). The
    pairs are up to sqrt(n) more than n: what lands beyond n goes round again.
    """
    if n > 1 << 32:
        raise ValueError(f"an order holds at most {1 << 32} samples, not {n}")
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
    """One pass of the network over [0, moduli[0] * moduli[1]), both at most 2**16."""
    halves = [half.astype(np.uint32) for half in np.divmod(x, moduli[1])]
    for i, key in enumerate(keys):
        moved, modulus = halves[i % 2], np.uint32(moduli[i % 2])
        noise = _mix32(halves[1 - i % 2] ^ key)
        # The upper 16 bits of the hash, scaled to the modulus: division would take most time.
        noise >>= np.uint32(16)
        noise *= modulus
        noise >>= np.uint32(16)
        moved += noise
        np.subtract(moved, modulus, out=noise)  # below the modulus this wraps to a huge number
        np.minimum(moved, noise, out=moved)
    return halves[0].astype(np.int64) * moduli[1] + halves[1]


def _mix32(x: Uint32) -> Uint32:
    """Scramble 32-bit words in place (C. Wellons, "Prospecting for Hash Functions", 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return x


def balanced(labels: Int64, count: int, *, seed: int) -> Int64:
    """Draw as many samples of every class: a pure function of the arguments.

    Args:
        labels: int64 (n,), class ids.
        count: samples per class.
        seed: decides which; a larger count adds to what a smaller one draws.

    Returns:
        int64 (classes * count,), rising.

    Raises:
        ValueError: a sample without a label, or a class with fewer samples.
    """
    if labels.min() < 0:
        raise ValueError("samples_per_class needs a label for every sample")
    sizes = np.bincount(labels)
    small = np.flatnonzero((sizes > 0) & (sizes < count))
    if len(small):
        raise ValueError(
            f"samples_per_class={count}: class {small[0]} has {sizes[small[0]]} samples only"
        )
    order = permutation(len(labels), seed=seed, epoch=-_LIMIT_STREAM)
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = (np.cumsum(sizes) - sizes)[sizes > 0]
    return np.sort(by_class[(starts[:, None] + np.arange(count)).reshape(-1)])


@dataclass(frozen=True)
class Order:
    """The sequence of batches of one rank."""

    n: int
    """Samples in the data set, before `max_samples`."""
    spec: LoaderSpec
    shard: Shard
    labels: Int64 | None = None
    """(n,): class ids, which `samples_per_class` needs."""

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
        """The samples in use, rising; None: all."""
        spec = self.spec
        if spec.samples_per_class is not None:
            if self.labels is None:
                raise ValueError("samples_per_class needs labels")
            return balanced(self.labels, spec.samples_per_class, seed=spec.seed)
        if spec.max_samples is None or spec.max_samples >= self.n:
            return None
        first = np.arange(spec.max_samples, dtype=np.int64)
        return np.sort(permutation(self.n, seed=spec.seed, epoch=-_LIMIT_STREAM, at=first))

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
        """The epoch's sample indices over all ranks.

        Args:
            epoch: Counted from 0.
            at: (m,): the places of the epoch to return, each in [0, size); None returns all.

        Returns:
            int64 (size,), or (m,) with `at`.
        """
        seed, size = self.spec.seed, self.size
        if self.spec.shuffle:
            at = permutation(size, seed=seed, epoch=epoch, at=at)
        elif at is None:
            at = np.arange(size, dtype=np.int64)
        return at if self._chosen is None else self._chosen[at]

    def batches(self, epoch: int, start_step: int = 0) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """This rank's indices and validity for the steps from start_step on.

        Returns:
            int64 (steps - start_step, B) and bool of the same shape. Padding repeats the epoch's
            last sample and is not valid.
        """
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step {start_step} is not in an epoch of {self.steps} steps")
        size = self.spec.batch_size
        first = np.arange(start_step, self.steps, dtype=np.int64) * self.global_batch
        places = (first + self.shard.rank * size)[:, None] + np.arange(size)
        valid = places < self.size
        np.minimum(places, self.size - 1, out=places)
        return self.samples(epoch, places.reshape(-1)).reshape(places.shape), valid
