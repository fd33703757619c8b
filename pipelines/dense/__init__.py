"""Data loading for detection and segmentation: images of variable size with boxes or masks.

Public: `batch` (`DenseBatch`, `Target`), `loader` (`DenseLoader`, `open_dense`) and `spec`.
Imports: samples, beton, datasets, device, imaging, jpeg, sampling, batch, native, arrays, spec,
storage and checks.
"""
