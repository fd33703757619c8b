"""The beton file format: layout, reader, writer, manifest and side file.

Public: `layout`, `manifest` (`Manifest`, `RestartCounts`, `manifest_path`), `reader` (`Beton`,
`BetonError`, `verify`), `segments`, `splicing` (`splice_batch`) and `writer` (`FIELDS`,
`BetonWriter`, `PageTooSmall`, `page_for`).
Imports: imaging, jpeg, sampling, batch, native, arrays, spec and storage.
"""
