"""The command lines of the scripts: pick a recipe, change its fields."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro

from rotpred import distributed
from rotpred.program import INTERRUPTED, USER_ERROR
from rotpred.protocols import (
    detection,
    finetune,
    knn,
    linear,
    pretrain,
    rotation,
    segmentation,
    svm,
)
from rotpred.recipes import every
from rotpred.recipes.detection import Detection
from rotpred.recipes.finetune import FineTuning
from rotpred.recipes.knn import Knn
from rotpred.recipes.linear import Linear
from rotpred.recipes.pretrain import Pretrain
from rotpred.recipes.rotation import Rotation
from rotpred.recipes.segmentation import Segmentation
from rotpred.recipes.svm import LowShot, Svm
from rotpred.records.console import configure_logging
from rotpred.training.loop import STOP_STATUS, Stopped

logger = logging.getLogger(__name__)

AnyRecipe = (
    Pretrain | Linear | FineTuning | Svm | LowShot | Knn | Rotation | Detection | Segmentation
)
R = TypeVar("R", bound=AnyRecipe)


def choose(recipes: Mapping[str, Callable[[], R]], args: Sequence[str], about: str) -> R:
    """The recipe that the first argument names, with the fields that the others change.

    Exits with status 2, after one line and suggestions, on a name or field that does not exist.
    """
    listed = not args or args[0].startswith("-")
    if not listed and args[0] not in recipes:
        # tyro would take it for an option and explain those of every recipe.
        close = ", ".join(difflib.get_close_matches(args[0], recipes))
        meant = f": did you mean {close}?" if close else ""
        print(f"error: no recipe {args[0]!r}{meant} (--help lists all)", file=sys.stderr)  # noqa: T201
        sys.exit(USER_ERROR)
    defaults = {name: (_describe(make, listed), make()) for name, make in recipes.items()}
    return tyro.extras.overridable_config_cli(
        defaults, args=list(args), description=about, config=(tyro.conf.AvoidSubcommands,)
    )


def _describe(make: Callable[[], object], listed: bool) -> str:
    """A recipe's docstring: its first line in a list of recipes, else paragraphs."""
    text = inspect.getdoc(make) or ""
    if listed:
        return text.partition("\n")[0]
    return re.sub(r"\n(?=(VISSL|Command|Published|Measured)\b|\()", "\n\n", text)


def pretrain_main(args: Sequence[str] | None = None) -> int:
    """scripts/pretrain.py: returns the exit status."""
    recipe = choose(
        every.PRETRAINING,
        sys.argv[1:] if args is None else args,
        "Pretrain by rotation prediction. Start with torchrun for several processes.",
    )
    return _drive(recipe)


def evaluate_main(args: Sequence[str] | None = None) -> int:
    """scripts/evaluate.py: returns the exit status."""
    recipe = choose(
        every.EVALUATION,
        sys.argv[1:] if args is None else args,
        "Evaluate pretrained weights. RECIPE --help tells source, command and options of one. "
        "Start with torchrun for several processes.",
    )
    return _drive(recipe)


def _drive(recipe: AnyRecipe) -> int:
    try:
        with distributed.process_group(
            recipe.run.device, timeout_seconds=recipe.run.timeout
        ) as rank:
            configure_logging(rank=rank.rank)
            match recipe:
                case Pretrain():
                    pretrain.run(recipe, rank)
                case Linear():
                    linear.run(recipe, rank)
                case FineTuning():
                    finetune.run(recipe, rank)
                case Detection():
                    detection.run(recipe, rank)
                case Segmentation():
                    segmentation.run(recipe, rank)
                case Svm():
                    svm.run(recipe, rank)
                case LowShot():
                    svm.run_low_shot(recipe, rank)
                case Knn():
                    knn.run(recipe, rank)
                case Rotation():
                    rotation.run(recipe, rank)
    except Stopped as stop:
        logger.warning("%s", stop)
        return STOP_STATUS
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        # One line for what the person at the keyboard can change, full disks and silent loaders
        # among it; a traceback is for our mistakes.
        if os.environ.get("ROTPRED_DEBUG"):
            raise
        print(f"error: {error} (ROTPRED_DEBUG=1 shows where)", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    return 0
