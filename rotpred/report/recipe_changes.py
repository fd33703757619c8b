"""What a run did otherwise than the recipe that it is named after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rotpred.files import plain
from rotpred.recipes.every import EVALUATION, PRETRAINING
from rotpred.report import published

FREE = frozenset(
    (
        # Where things are.
        *("name", "weights", "data", "root", "out", "cache", "train_labels", "val_labels"),
        # Who computes, how fast, and what is kept of it.
        *("engine", "workers", "decoder", "hw_decoder_load", "cpu_budget", "samples", "timeout"),
        *(
            "device",
            "compile",
            "cuda_graph",
            "log_every_steps",
            "save_every_steps",
            "keep_checkpoints",
            "profile",
        ),
        *(
            "masks",
            "class_names",
            "predictions",
            "save_predictions",
            "eval_every_epochs",
            "grid",
            "seed",
            "max_undecodable",
        ),
        # `cpu` and `device` give the same pixels but for rounding.
        "resize",
    )
)
"""Fields, at any depth, that may differ without making another protocol of a recipe."""

SAME = ("val.batch_size", "run.type")
"""Such fields where they stand: batches that nothing learns from, the name of one of our types."""

BATCH = ("train.batch_size", "run.accumulate")
"""What makes, with the number of processes, the batch of an update."""

EPOCH = "train.steps_per_epoch"
"""More steps of fewer images are the same epoch (`dense.scaled`)."""

PROCESSES = {
    # The paper's networks were trained on one GPU.
    **dict.fromkeys(published.PRETEXT, 1),
    **dict.fromkeys(("rotnet_in1k_r50", "rotnet_in1k_r50_amp", "places205_mhead_vissl"), 8),
    **{name: table.processes for table in published.TABLES for name in table.recipes},
}
"""Of the recipes whose results were published."""

Value = str | int | float | bool | None


def recipe_changes(recipe: Mapping[str, object], *, processes: int | None) -> tuple[str, ...]:
    """The fields of a run's recipe.json that are not as published, in words.

    Where it is known what batch an update was published with, that is what counts, however many
    processes share it.

    Args:
        recipe: as the run folder has it. What older or newer code does not know is passed over,
            and so are names that are no recipe's.
        processes: of the run; None if unknown.
    """
    name = str(recipe.get("name"))
    make = {**PRETRAINING, **EVALUATION}.get(name)
    if make is None:
        return ()
    own: dict[str, Any] = dict(_leaves(plain(make())))
    ours: dict[str, Any] = own | {k: v for k, v in _leaves(recipe) if k in own}
    passed, words = set[str](), []
    if not any(field.startswith(("optim.", "probes.")) for field in own):
        passed.add("train.batch_size")  # nothing learns from batches
    elif processes is not None and name in PROCESSES:
        passed.update(BATCH)
        expected = PROCESSES[name] * _product(own, BATCH)
        found = processes * _product(ours, BATCH)
        if found != expected:
            words.append(f"{found} images in an update (recipe: {expected})")
        if ours.get(EPOCH) and own[EPOCH]:
            step = processes * ours["train.batch_size"]
            there = PROCESSES[name] * own["train.batch_size"] * own[EPOCH]
            if abs(step * ours[EPOCH] - there) <= step:  # steps are rounded
                passed.add(EPOCH)
    words += [
        f"{field} {_text(value)} (recipe: {_text(own[field])})"
        for field, value in ours.items()
        if field not in passed and value != own[field]
    ]
    return tuple(words)


def _product(fields: Mapping[str, int], names: Iterable[str]) -> int:
    return math.prod(fields[name] for name in names)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, Value | tuple[object, ...]]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in FREE and f"{path}{name}" not in SAME:
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
