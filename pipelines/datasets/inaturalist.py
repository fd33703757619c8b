"""iNaturalist competitions, read from their COCO-style JSON."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.datasets.files import IndexFormatError, read_json, require_folder
from pipelines.datasets.index import SampleIndex


def inaturalist(
    annotations: str | os.PathLike[str], *, root: str | os.PathLike[str]
) -> SampleIndex:
    """Index the images of an iNaturalist competition.

    Args:
        annotations: The COCO-style JSON file, train2018.json or val2018.json.
        root: The folder that contains train_val2018, or train_val2018 itself. Names in the file
            start with train_val2018/, and some archives were unpacked into a folder of that name.

    Raises:
        FileNotFoundError: A file, folder or image is missing.
        IndexFormatError: A part of the file is missing, or an image does not have exactly one
            category.
    """
    source, base = Path(annotations), require_folder(root)
    content = read_json(source)
    try:
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        categories = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        pairs = [(int(a["image_id"]), int(a["category_id"])) for a in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        what = f"expected images, annotations and categories: {type(error).__name__} {error}"
        raise IndexFormatError(f"{source}: {what}") from error
    labels = dict(pairs)
    if not names or len(pairs) != len(labels) or labels.keys() != names.keys():
        odd = sorted(labels.keys() ^ names.keys())[:1]
        where = f"image id {odd[0]}" if odd else f"{len(pairs)} annotations, {len(names)} images"
        raise IndexFormatError(f"{source}: expected one annotation per image: {where}")
    if sorted(categories) != list(range(len(categories))):
        raise IndexFormatError(f"{source}: category ids are not 0..{len(categories) - 1}")
    unknown = next((image for image, label in labels.items() if label not in categories), None)
    if unknown is not None:
        raise IndexFormatError(f"{source}: image id {unknown}: no category {labels[unknown]}")
    first = next(iter(names.values()))
    top, _, rest = first.partition("/")
    if (base / first).is_file():
        pass
    elif (base / top / first).is_file():
        base = base / top
    elif rest and (base / rest).is_file():
        if any(not name.startswith(f"{top}/") for name in names.values()):
            raise IndexFormatError(f"{source}: not all file names begin with {top!r}")
        names = {image: name[len(top) + 1 :] for image, name in names.items()}
    else:
        raise FileNotFoundError(f"{source}: {first!r} is not below {str(base)!r}")
    ids = [labels[image] for image in names]
    classes = [categories[i] for i in range(len(categories))]
    index = SampleIndex.from_names(base, names.values(), ids, classes)
    numbers = list(names)
    index.require_files(lambda i: f"{source}: image id {numbers[i]}")
    return index
