"""Weights files: reading any known layout, loading, saving and exporting.

Public: `export` (`export_backbone`), `formats` (`Format`, `reader_settings`), `frozen_backbone`
(`RANDOM`, `load_frozen_backbone`) and `load` (`load_backbone`, `load_rotnet`, `read_backbone`,
`save_backbone`).
Imports: `pipelines`, and of `rotpred` features, plots, training, svm, program, records, metrics,
models and distributed.
"""
