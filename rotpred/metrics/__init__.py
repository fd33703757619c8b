"""Metrics: classification counts, average precision, detection metrics, predictions in files.

Public: all modules.
Imports: `pipelines`, and of `rotpred` distributed.
"""
