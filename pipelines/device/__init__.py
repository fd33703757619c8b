"""Uint8 crops to normalised views on the training device: transfer, rotation, color jitter.

Public: `color_jitter` (`draw_jitter`, `jitter_views`), `host_memory` (`BufferPool`), `rotate`
(`normalize_views`, `rotate4`) and `transfer` (`Transfer`).
Imports: imaging, jpeg, sampling, batch, native, arrays, spec and storage.
"""
