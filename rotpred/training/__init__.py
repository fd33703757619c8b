"""Training: loop, state, optimisers, schedules, checkpoints, and the settings of a run.

Public: `checkpoint` (`load`, `sidecar_of`), `data` (`check_data`, `open_data`), `loader_interface`,
`loop`, `precision` (`autocast`), `schedule`, `settings` (`Optim`, `RunSettings`), `state` and
`sync_bn`.
Imports: `pipelines`, and of `rotpred` svm, program, records, metrics, models and distributed.
"""
