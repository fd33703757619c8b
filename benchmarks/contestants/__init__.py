"""What is measured: our loader, other loaders, beton writers, single stages of training.

`doctor.py` imports `stages`, and `data` imports `writers`. All other contestants are started by
`harness.runner`, which names them by `process.KINDS`. Imports `harness`, `pipelines` and `rotpred`.
"""
