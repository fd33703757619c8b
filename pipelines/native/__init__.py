"""Native code: numba compilation, LLVM intrinsics, threads for code that releases the GIL.

Public: `jit` (`njit`), `llvm` and `threads` (`DaemonWorker`, `LaneThreads`).
Imports: nothing of `pipelines`.
"""
