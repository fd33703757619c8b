"""The measuring harness: timed windows, contestant processes, result rows, figures.

The programs and `contestants` import `runner`, `timing`, `results`, `plots`, `ceilings` and
`training_step`. Imports `pipelines` and `rotpred`, and no other package of the benchmarks.
"""
