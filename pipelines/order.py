"""Which samples, in which order, on which rank: pure functions of (n, seed, epoch, step, world).

The order does not depend on the world: one permutation of the epoch is cut into global batches of
batch_size * world samples, and each rank takes its slice. Stopping at any step and going on with
another number of ranks (and the same global batch) meets the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.spec import LoaderSpec, Shard

Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LIMIT_STREAM = 0x11317  # keeps the draw of `limit` apart from every epoch's permutation


def mix64(x: Uint64) -> Uint64:
    """Scramble 64-bit words: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key64(*words: int) -> np.uint64:
    """One 64-bit key from several integers, each hashed in turn.

    Hashing, not adding: with seed + epoch, seed 0 in epoch 1 would repeat seed 1 in epoch 0.
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = mix64(state + _GOLDEN + np.uint64(word & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(state[0])


def permutation(n: int, *, seed: int, epoch: int) -> Int64:
    """The order of n samples in an epoch, int64 (n,), from a generator keyed by (seed, epoch)."""
    generator = np.random.Generator(np.random.Philox(key=int(key64(seed, epoch))))
    return generator.permutation(n)


@dataclass(frozen=True)
class Order:
    """The sequence of batches of one rank."""

    n: int
    """Samples in the data set, before `limit`."""
    spec: LoaderSpec
    shard: Shard

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
        """Samples in use, after `limit`."""
        return self.n if self.spec.limit is None else min(self.n, self.spec.limit)

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

    def samples(self, epoch: int) -> Int64:
        """The epoch's sample indices over all ranks, int64 (size,)."""
        if self.spec.limit is not None and self.spec.limit < self.n:
            chosen = permutation(self.n, seed=self.spec.seed, epoch=-_LIMIT_STREAM)
            base = np.sort(chosen[: self.size])
        else:
            base = np.arange(self.n, dtype=np.int64)
        if not self.spec.shuffle:
            return base
        return base[permutation(self.size, seed=self.spec.seed, epoch=epoch)]

    def batches(self, epoch: int, start_step: int = 0) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """This rank's indices and validity for the steps from start_step on.

        Returns:
            int64 (steps - start_step, B) and bool of the same shape. Padding repeats the epoch's
            last sample and is not valid.
        """
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step {start_step} is not in an epoch of {self.steps} steps")
        total = self.steps * self.global_batch
        samples = self.samples(epoch)
        valid = np.arange(total) < len(samples)
        if total > len(samples):
            samples = np.concatenate([samples, np.full(total - len(samples), samples[-1])])
        shape = (self.steps, self.shard.world, self.spec.batch_size)
        mine = (slice(start_step, None), self.shard.rank)
        return (
            np.ascontiguousarray(samples[:total].reshape(shape)[mine]),
            np.ascontiguousarray(valid.reshape(shape)[mine]),
        )
