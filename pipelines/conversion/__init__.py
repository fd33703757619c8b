"""Conversion of any image data set to a beton, in worker processes.

Public: `convert` (`write_beton`) and `encode` (`Check`).
Imports: beton, datasets, device, imaging, jpeg, sampling, batch, native, arrays, spec and storage.
"""
