"""Engine: NVIDIA DALI. Reads betons and image files.

Public: `source` (`DaliSource`). Only `graph` imports nvidia.dali.
Imports: engines, but no other engine, and what engines may import.
"""
