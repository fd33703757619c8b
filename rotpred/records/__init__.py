"""Records of a run: the run folder, its logs and results, the console, TensorBoard.

Public: `console` (`configure_logging`), `folder` (`DONE`, `environment`, `read_results`),
`former_names`, `log` (`RunLog`, `lock`, `read_rows`), `progress` (`Progress`) and `tensorboard`
(`pixels`).
Imports: `pipelines`, and of `rotpred` distributed.
"""
