"""Translation of field and type names from older run folders, on reading.

Version 0.1 wrote other names into recipe.json, log.jsonl, results.json and checkpoints, 0.2 some
into recipe.json and done.json. The values are the same, so such a folder can be resumed and
reported like any other.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

_FIELDS = {
    "colour": "color_jitter",
    "eval_every": "eval_every_epochs",
    "head_mult": "head_lr_mult",
    "head_mults": "head_lr_mults",
    "keep": "keep_checkpoints",
    "limit": "max_samples",
    "log_every": "log_every_steps",
    "max_bad": "max_undecodable",
    "per_class": "samples_per_class",
    "save_every": "save_every_steps",
    "sides": "resolution_schedule",
}

_DENSE_FIELDS = {"max_bad": "max_invalid_annotations"}
"""Fields that have another name in a `DenseSpec`, which alone has a `geometry`."""

_TYPES = {
    "CachedFeatureRun": "FeatureRun",
    "CachedPlace": "FeatureRun",
    "Colour": "ColorJitter",
    "Place": "FeatureRun",
    "Run": "RunSettings",
    "Semi": "FineTuning",
    "Squash": "Resize",
    "Within": "FitWithin",
}

_TEXTS = frozenset(("root", "out", "predictions", "cache", "train_labels", "val_labels"))
"""Fields in which an empty text stood for "not given" up to 0.2."""

_OPTIONS = {"cache-store": "store", "run.cache": "cache"}
"""Options of 0.2, in which evaluations named their caches differently."""

_COLUMNS = {"head_mult": "head_lr_mult", "wait_percent": "data_wait_percent"}


def _former_fields(spec: Container[object]) -> Mapping[str, str]:
    return _FIELDS | _DENSE_FIELDS if "geometry" in spec else _FIELDS


def translate_row(row: Mapping[str, object]) -> dict[str, object]:
    """Return a row of log.jsonl or results.json with its columns renamed to the current names."""
    return {_COLUMNS.get(name, name): value for name, value in row.items()}


def translate_names(value: object) -> Any:
    """Rename fields, and the recipe types under `type`, to the current names; None if not given.

    Args:
        value: Decoded JSON. Current names are kept.

    Returns:
        A copy with the current names.
    """
    if isinstance(value, Mapping):
        fields = _former_fields(value)
        renamed = {
            fields.get(str(key), str(key)): translate_names(item) for key, item in value.items()
        }
        for key in ("type", "kind"):
            if isinstance(kind := renamed.get(key), str):
                renamed[key] = _TYPES.get(kind, kind)
        if isinstance(run := renamed.get("run"), dict) and "cache" in run:
            renamed["cache"] = run.pop("cache")
        if "cache_store" in renamed:
            renamed["store"] = renamed.pop("cache_store")
        for name in _TEXTS.intersection(renamed):
            renamed[name] = renamed[name] or None
        return renamed
    if isinstance(value, list):
        return [translate_names(item) for item in value]
    return value


def restore_names(value: object) -> Any:
    """Rename fields and types back to the names of 0.1; the inverse of `translate_names`.

    Cache keys are computed from the names of 0.1, so that features cached by 0.1 are still found.

    Args:
        value: Plain JSON with current names.
    """
    fields = {new: old for old, new in (*_FIELDS.items(), *_DENSE_FIELDS.items())}
    types = {new: old for old, new in _TYPES.items()}
    if isinstance(value, Mapping):
        former = {
            fields.get(str(key), str(key)): restore_names(item) for key, item in value.items()
        }
        if isinstance(kind := former.get("kind"), str):
            former["kind"] = types.get(kind, kind)
        return former
    if isinstance(value, list):
        return [restore_names(item) for item in value]
    return value


def translate_option(word: str, spec: Container[object]) -> str:
    """Rename an option of a command line, `--train.limit`, to its current name.

    Args:
        word: Any word of a command; what is not a former option is returned unchanged.
        spec: Names of the fields of the recipe's data specs, former or current ones.
    """
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    if (name := option[2:].replace("_", "-")) in _OPTIONS:
        return f"--{_OPTIONS[name]}{equals}{value}"
    path = [part.replace("-", "_") for part in option[2:].split(".")]
    fields = _former_fields(spec)
    renamed = [fields.get(part, part).replace("_", "-") for part in path]
    changed = any(part in fields for part in path)
    return f"--{'.'.join(renamed)}{equals}{value}" if changed else word
