"""Names of fields and types that older run folders use, translated on reading.

Version 0.1 wrote other names into recipe.json, log.jsonl, results.json and checkpoints. The values are
the same, so that such a folder resumes and is reported like any other.
"""

from __future__ import annotations

from collections.abc import Mapping

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

_TYPES = {
    "CachedPlace": "CachedFeatureRun",
    "Colour": "ColorJitter",
    "Place": "FeatureRun",
    "Run": "RunSettings",
    "Semi": "FineTuning",
    "Squash": "Resize",
    "Within": "FitWithin",
}


_COLUMNS = {"head_mult": "head_lr_mult", "wait_percent": "data_wait_percent"}


def translated_row(row: Mapping[str, object]) -> dict[str, object]:
    """A row of log.jsonl or results.json with today's names of its columns."""
    return {_COLUMNS.get(name, name): value for name, value in row.items()}


def translated(value: object) -> object:
    """Plain JSON with today's field names, and today's names of recipe types under `type`.

    Args:
        value: as `json.loads` returns it; present names pass through.
    """
    if isinstance(value, Mapping):
        renamed = {_FIELDS.get(str(key), str(key)): translated(item) for key, item in value.items()}
        if isinstance(kind := renamed.get("type"), str):
            renamed["type"] = _TYPES.get(kind, kind)
        return renamed
    if isinstance(value, list):
        return [translated(item) for item in value]
    return value
