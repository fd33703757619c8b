"""Encoded images to pixels on the CPU: decode, crop, resize.

Public: `decode`, `resize` (`resize_region`, `scratch_size`) and `torchvision_decode` (`crop`,
`decode`).
Imports: jpeg, sampling, batch, native, arrays, spec and storage.
"""
