"""JPEG streams as bytes: markers, Huffman codes, restart markers, splicing. No pixels.

Public: `markers`, `restart_markers` (`RestartLayout`, `insert_restart_markers`), `scan` (`Scan`,
`walk_scan`) and `splice` (`MISMATCH_REASON`, `splice`).
Imports: native, arrays, spec and storage.
"""
