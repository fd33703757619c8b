"""Data to measure on: photographs, annotated scenes, betons of any size.

The programs import `photographs`, `annotated_scenes` and `sparse_beton`; `stock_ffcv_beton` is run
as a program. Imports `contestants`, `harness` and `pipelines`.
"""
