"""What a run did otherwise than the recipe that it is named after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rotpred.recipes.every import EVALUATION, PRETRAINING
from rotpred.runfolder import plain

FREE = frozenset(
    (
        # Where things are.
        *("name", "weights", "data", "root", "out", "cache", "train_labels", "val_labels"),
        # Who computes, how fast, and what is kept of it.
        *("engine", "workers", "decoder", "hw_decoder_load", "cpu_budget", "samples", "timeout"),
        *("device", "compile", "cuda_graph", "log_every", "save_every", "keep", "profile"),
        *(
            "masks",
            "class_names",
            "predictions",
            "save_predictions",
            "eval_every",
            "grid",
            "seed",
            "max_bad",
        ),
        # `cpu` and `device` give the same pixels but for rounding.
        "resize",
    )
)
"""Fields, at any depth, that may differ without making another protocol of a recipe."""

SAME = ("val.batch_size", "run.type")
"""Such fields where they stand: batches that nothing learns from, the name of one of our types."""

Value = str | int | float | bool | None


def departures(recipe: Mapping[str, object]) -> tuple[str, ...]:
    """The fields of a run's recipe.json that are not as published, in words.

    Args:
        recipe: as the run folder has it. What older or newer code does not know is passed over,
            and so are names that are no recipe's.
    """
    make = {**PRETRAINING, **EVALUATION}.get(str(recipe.get("name")))
    if make is None:
        return ()
    published = dict(_leaves(plain(make())))
    return tuple(
        f"{name} {_text(value)} (recipe: {_text(published[name])})"
        for name, value in _leaves(recipe)
        if name in published and value != published[name]
    )


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
