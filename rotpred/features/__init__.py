"""Features of a frozen backbone over whole data sets, cached on disk.

Public: `base` (`Features`, `Store`), `extract` (`extract`, `open_extraction_loader`) and
`loader` (`FeatureLoader`).
Imports: `pipelines`, and of `rotpred` weights, plots, training, svm, program, records, metrics,
models and distributed.
"""
