"""Sampling: which samples in which order, cut where, as pure functions of (seed, epoch, index).

Public: `crops` (`can_exceed_image`, `crop_boxes`, `padded_side`), `order` (`Order`, `permutation`)
and `random_bits` (`digest64`, `uniforms`).
Imports: native, arrays, spec and storage.
"""
