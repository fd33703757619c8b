"""Protocols: training, evaluation and results of every kind of recipe.

Public: one module per protocol with `run(recipe, rank)`, and `run_low_shot` of `svm`; `run`
(`Run`, `open_run`), with which all of them open a run; for benchmarks, `pretrain`
(`rotation_objective`), `dense` (`Task`), `detection` (`DetectionTask`) and `segmentation`
(`SegmentationTask`).
No protocol imports another.
Imports: `pipelines`, and of `rotpred` recipes, features, weights, plots, training, svm, program,
records, metrics, models and distributed.
"""
