"""The results page: finished run folders in, Markdown or HTML out.

Public: `build` (`TITLE`, `page`), `gallery` (`feature_gallery`), `page` (`Block`, `html`,
`markdown`) and `results` (`FinishedRun`, `read_runs`).
Imports: `pipelines`, and of `rotpred` recipes, features, weights, plots, training, svm, program,
records, metrics, models and distributed.
"""
