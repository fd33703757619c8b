"""Engines: each decodes the crops of a data set. Also the choice and autotuning of an engine.

Public: `autotune` (`thread_budget`), `choice` (`choose_engine`, `missing_engines`, `open_engine`),
`source` (`DecodeErrorBudget`, `Source`) and `synthetic` (`CLASSES`, `SyntheticSource`).
Imports: samples, beton, datasets, device, imaging, jpeg, sampling, batch, native, arrays, spec,
storage and checks.
No engine imports another.
"""
