"""The measuring harness: timed windows, contestant processes, result rows, figures.

The programs and `contestants` import `runner`, `timing`, `results`, `plots`, `ceilings` and
`training_step`. The harness imports `pipelines` and `rotpred`, and no other room of the benchmarks.
"""
