"""Linear SVM solvers: the same objective in the dual and in the primal, on any device.

Public: `dual` (`gram`, `normalize_rows`, `solve`), `low_shot` (`ShotResult`, `aggregate`,
`draw_samples`, `scores_of_draw`) and `primal` (`Kernels`, `compact`, `solve_compact`).
Imports: `pipelines`, and of `rotpred` training, program, records, metrics, models and
distributed.
"""
