"""Matplotlib figures: training curves, confusion, detections, masks, features, SVM results.

Public: all modules. Their functions take arrays, tensors or log rows and return a `Figure`.
Imports: `pipelines`, and of `rotpred` features, weights, training, svm, program, records, metrics,
models and distributed.
"""
