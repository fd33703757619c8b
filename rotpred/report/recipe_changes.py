"""Differences between a run's resolved recipe and the published one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rotpred.recipes.every import EVALUATION, PRETRAINING
from rotpred.records.recipe_json import plain
from rotpred.report import published

IGNORED_FIELDS = frozenset(
    (
        # Names and paths.
        "name weights data root out cache train_labels val_labels "
        # Hardware, speed, output, selection and repetition.
        "engine workers decoder hw_decoder_load cpu_budget samples timeout device compile "
        "cuda_graph log_every_steps save_every_steps keep_checkpoints profile masks class_names "
        "predictions save_predictions eval_every_epochs grid seed "
        "max_undecodable max_invalid_annotations "
        # `cpu` and `device` give the same pixels except for rounding.
        "resize"
    ).split()
)
"""Fields, at any depth, that do not change the protocol."""

IGNORED_PATHS = ("val.batch_size", "run.type")
"""Further such fields, by path: the batch size of a validation, the name of one of our types."""

BATCH_FIELDS = ("train.batch_size", "run.accumulate")
"""Their product, times the number of processes, is the batch size of an update."""

STEPS_FIELD = "train.steps_per_epoch"
"""More steps of smaller batches are the same epoch (`rotpred.protocols.dense.scaled`)."""

PROCESSES = {
    # The paper's networks were trained on one GPU.
    **dict.fromkeys(published.PRETEXT, 1),
    **dict.fromkeys(("rotnet_in1k_r50", "rotnet_in1k_r50_amp", "places205_mhead_vissl"), 8),
    **{name: table.processes for table in published.TABLES for name in table.recipes},
}
"""Number of processes of the recipes whose results were published."""

Value = str | int | float | bool | None


def recipe_changes(recipe: Mapping[str, object], *, processes: int | None) -> tuple[str, ...]:
    """List the fields of a run's recipe.json that differ from the published recipe.

    If the published batch size of an update is known, it is compared as a whole; any number of
    processes may share it.

    Args:
        recipe: From the run folder. Fields that the present recipe does not have are ignored. An
            unknown recipe has no changes.
        processes: Number of processes of the run; None if unknown.

    Returns:
        One text per change, such as "run.precision bf16 (recipe: fp32)".
    """
    name = str(recipe.get("name"))
    make = {**PRETRAINING, **EVALUATION}.get(name)
    if make is None:
        return ()
    published_fields: dict[str, Any] = dict(_leaves(plain(make())))
    run_fields: dict[str, Any] = published_fields | {
        k: v for k, v in _leaves(recipe) if k in published_fields
    }
    skipped, changes = set[str](), []
    if not any(field.startswith(("optim.", "probes.")) for field in published_fields):
        skipped.add("train.batch_size")  # nothing is trained on batches
    elif processes is not None and name in PROCESSES:
        skipped.update(BATCH_FIELDS)
        expected = PROCESSES[name] * _product(published_fields, BATCH_FIELDS)
        found = processes * _product(run_fields, BATCH_FIELDS)
        if found != expected:
            changes.append(f"{found} images per update (recipe: {expected})")
        if run_fields.get(STEPS_FIELD) and published_fields[STEPS_FIELD]:
            batch = processes * run_fields["train.batch_size"]
            published_batch = PROCESSES[name] * published_fields["train.batch_size"]
            epoch_images = published_batch * published_fields[STEPS_FIELD]
            if abs(batch * run_fields[STEPS_FIELD] - epoch_images) <= batch:  # steps are rounded
                skipped.add(STEPS_FIELD)
    changes += [
        f"{field} {_text(value)} (recipe: {_text(published_fields[field])})"
        for field, value in run_fields.items()
        if field not in skipped and value != published_fields[field]
    ]
    return tuple(changes)


def _product(fields: Mapping[str, int], names: Iterable[str]) -> int:
    return math.prod(fields[name] for name in names)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, Value | tuple[object, ...]]]:
    """Yield the dotted path and value of each field that counts."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in IGNORED_FIELDS and f"{path}{name}" not in IGNORED_PATHS:
                yield from _leaves(item, f"{path}{name}.")
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}{i}.")
    elif isinstance(value, list):
        yield path[:-1], tuple(value)
    elif value is None or isinstance(value, str | int | float | bool):
        yield path[:-1], value


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
