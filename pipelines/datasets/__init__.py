"""Data sets as they are distributed: images, labels and annotations. No photographs are decoded.

Public: `annotations`, `images` (`Images`, `open_images`), `index` (`SampleIndex`),
`voc_classification` (`VOC_CLASSES`, `voc2007`), `cityscapes`, `coco` and `voc`.
Imports: imaging, jpeg, sampling, batch, native, arrays, spec and durable.
"""
