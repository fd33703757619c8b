"""Recipes: frozen dataclasses, and functions that return them filled with published settings.

Public: `every` (`EVALUATION`, `PRETRAINING`), one module per protocol with its dataclasses, its
recipes and `RECIPES`, and `probe` (`Probe`).
Imports: `pipelines`, and of `rotpred` features, weights, plots, training, svm, program, records,
metrics, models and distributed.
"""
