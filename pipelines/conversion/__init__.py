"""Conversion of any image data set to a beton, in worker processes.

Public: `convert` (`write_beton`), `encode` (`Check`) and `inputs` (`open_input`).
Imports: samples, beton, datasets, device, imaging, jpeg, sampling, batch, native, arrays, spec,
storage and checks.
"""
