"""Counter-based random numbers and hashes: pure functions of integers."""

from __future__ import annotations

import numpy as np

from pipelines.arrays import Float64, Int32, Int64, Uint64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, epoch: int, indices: Int64, *, stream: int = 0xC309, count: int) -> Float64:
    """Return random numbers of samples, uniform in [0, 1).

    Args:
        seed: Key, together with epoch and stream.
        epoch: Counted from 0.
        indices: int64 (B,), sample indices.
        stream: One number per use. Different streams are independent.
        count: Numbers per sample.

    Returns:
        float64 (B, count). Rows of different samples are independent.
    """
    keys = mix64(indices.astype(np.uint64) + key64(seed, epoch, stream))
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    words = mix64(keys[:, None] + counters[None, :])
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def digest64(epoch: int, indices: Int64, boxes: Int32) -> int:
    """Hash the crops of samples: the sum of the hashes of (epoch, index, box), modulo 2**64.

    The sum does not depend on the order of samples. Digests of all ranks can be added (modulo
    2**64) and compared across engines and numbers of ranks.

    Args:
        epoch: Counted from 0.
        indices: int64 (B,), sample indices.
        boxes: int32 (B, 5), crop boxes as `pipelines.sampling.crops.crop_boxes` returns them.
    """
    words = mix64(indices.astype(np.uint64) + key64(epoch, 0xD16E))
    for column in boxes.astype(np.int64).view(np.uint64).T:
        words = mix64(words + _GOLDEN + column)
    return int(words.sum(dtype=np.uint64))


def mix64(x: Uint64) -> Uint64:
    """Hash an array of words: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key64(*words: int) -> np.uint64:
    """Hash several integers to one 64-bit key.

    Adding them would not do: with seed + epoch, seed 0 in epoch 1 would repeat seed 1 in epoch 0.
    """
    state = np.zeros(1, np.uint64)  # An array: NumPy warns of overflow in scalars only.
    for word in words:
        state = mix64(state + _GOLDEN + np.uint64(word & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(state[0])
