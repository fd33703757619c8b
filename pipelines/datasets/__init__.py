"""Data sets as distributed: files, labels, annotations. Decodes label masks, but no image files.

Public: `annotations`, `images` (`MemoryImages`, `open_images`), `index` (`SampleIndex`),
`voc_classification` (`VOC_CLASSES`, `voc2007`), `cityscapes`, `coco` and `voc`.
Imports: imaging, jpeg, sampling, batch, native, arrays, spec and storage.
"""
