"""Engine: FFCV, with the faults of its loader repaired. Reads betons only.

Public: `source` (`FfcvSource`); for benchmarks, `kernels` and `loader` (`RingLoader`, `Step`). Only
`loader` imports ffcv.
Imports: engines, but no other engine, and what engines may import.
"""
