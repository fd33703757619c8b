"""The command line of pretrain.py and evaluate.py: choose a recipe, override fields, run it."""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import inspect
import io
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rotpred.program import USER_ERROR, exit_status, report_error
from rotpred.recipes import every
from rotpred.recipes.detection import Detection
from rotpred.recipes.finetune import FineTuning
from rotpred.recipes.knn import Knn
from rotpred.recipes.linear import Linear
from rotpred.recipes.pretrain import Pretrain
from rotpred.recipes.rotation import Rotation
from rotpred.recipes.segmentation import Segmentation
from rotpred.recipes.svm import LowShot, Svm
from rotpred.records.console import configure_logging, discard
from rotpred.records.former_names import translate_option

logger = logging.getLogger(__name__)

AnyRecipe = (
    Pretrain | Linear | FineTuning | Svm | LowShot | Knn | Rotation | Detection | Segmentation
)
R = TypeVar("R", bound=AnyRecipe)


def choose(recipes: Mapping[str, Callable[[], R]], args: Sequence[str], about: str) -> R:
    """Return the recipe that the first argument names, with the fields that the others change.

    Every process of a job calls this with the same arguments; help is printed by the first one.

    Args:
        recipes: Functions that build the recipes, by name.
        args: The command line without the program.
        about: What the program does, for the table of recipes.

    Raises:
        SystemExit: Status 0 after help or, without a recipe, the table of recipes. Status 2 after a
            message and suggestions, for a recipe or field that does not exist.
    """
    program, first = Path(sys.argv[0]).name, os.environ.get("RANK", "0") == "0"
    if not args or args[0] in ("-h", "--help"):
        if first:
            _print(table(recipes, about))
        sys.exit(0)
    if args[0] not in recipes:
        # Otherwise tyro would report it as an unknown option of every recipe.
        close = ", ".join(difflib.get_close_matches(args[0], recipes))
        suggestion = f": did you mean {close}?" if close else ""
        hint = f"{program} without arguments lists all"
        report_error(f"error: no recipe {args[0]!r}{suggestion} ({hint})")
        sys.exit(USER_ERROR)
    return _parse(recipes[args[0]], args, program=program, first=first)


def _parse(make: Callable[[], R], args: Sequence[str], *, program: str, first: bool) -> R:
    """Return the recipe that `make` builds, with the fields that `args[1:]` change."""
    default = make()
    for word in args[1:]:
        if (renamed := translate_option(word, vars(default.val))) != word:
            report_error(f"error: {word} is now {renamed}")
            sys.exit(USER_ERROR)
    import tyro  # half a second that the table does not need

    captured = io.StringIO()
    with contextlib.ExitStack() as stack:
        if "RANK" in os.environ:  # under torchrun, only one process prints it
            stack.enter_context(contextlib.redirect_stdout(captured))
            stack.enter_context(contextlib.redirect_stderr(captured))
        try:
            return tyro.cli(
                type(default),
                prog=f"{program} {args[0]}",
                description=_paragraphs(make),
                args=list(args[1:]),
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
        except SystemExit as stop:
            status = stop.code
        except BrokenPipeError:
            discard("stdout")
            status = 0
    # Print after the redirection ends: errors once per machine, help on rank 0.
    if status and captured.getvalue():
        report_error(
            captured.getvalue().rstrip(), summary=f"{program}: invalid options for {args[0]}"
        )
    elif first and captured.getvalue():
        _print(captured.getvalue().rstrip())
    sys.exit(status)


def _print(text: str) -> None:
    """Print to stdout, which may be a pipe into a program that has ended, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard("stdout")  # Python flushes it again at exit


def table(recipes: Mapping[str, Callable[[], AnyRecipe]], about: str) -> str:
    """Return the table of recipes: name, purpose and default data of each.

    Args:
        recipes: Functions that build the recipes, by name.
        about: What the program does.
    """
    program = Path(sys.argv[0]).name
    width, margin = shutil.get_terminal_size().columns, " " * (max(map(len, recipes)) + 4)
    lines = [about, "", f"usage: [torchrun --nproc-per-node N] {program} RECIPE [options]", ""]
    for name, make in recipes.items():
        what = (inspect.getdoc(make) or "").partition("\n")[0]
        first = f"  {name}".ljust(len(margin))
        lines += textwrap.wrap(what, width, initial_indent=first, subsequent_indent=margin)
        lines.append(f"{margin}{_data(make())}")
    return "\n".join(
        (*lines, "", f"{program} RECIPE --help: source, command and options of that recipe.")
    )


def _data(recipe: AnyRecipe) -> str:
    """Return the data that a recipe reads by default, as a shell would abbreviate the names."""
    specs = [spec for spec in (getattr(recipe, "train", None), recipe.val) if spec is not None]
    names = list(dict.fromkeys(f"{s.root}, {s.data}" if s.root else s.data for s in specs))
    if len(names) < 2:
        return names[0]
    folder, ending = (re.match(r"[^:]*:|.*/", names[0]), re.search(r"\.\w+$", names[0]))
    start, end = folder[0] if folder else "", ending[0] if ending else ""
    if not all(name.startswith(start) and name.endswith(end) for name in names):
        return ", ".join(names)
    return f"{start}{{{','.join(name[len(start) :].removesuffix(end) for name in names)}}}{end}"


def _paragraphs(make: Callable[[], object]) -> str:
    """Return a recipe's docstring, one line per paragraph: source, command, published result."""
    paragraphs: list[str] = []
    for line in (inspect.getdoc(make) or "").split("\n"):
        begins = re.match(r"(Source|VISSL|Command|Published|Measured|Note)\b", line) is not None
        note = line.startswith("(") and paragraphs[-1].startswith("Command:")
        if not line or begins or note or not paragraphs:
            paragraphs.append(line)
        else:
            glue = "" if paragraphs[-1].endswith(("/", "-")) else " "  # a path over two lines
            paragraphs[-1] = f"{paragraphs[-1]}{glue}{line}".strip()
    return "\n\n".join(filter(None, paragraphs))


def pretrain_main(args: Sequence[str] | None = None) -> int:
    """scripts/pretrain.py: returns the exit status."""
    return _main(every.PRETRAINING, args, "Pretrain by rotation prediction.")


def evaluate_main(args: Sequence[str] | None = None) -> int:
    """scripts/evaluate.py: returns the exit status."""
    return _main(every.EVALUATION, args, "Evaluate pretrained weights on a transfer benchmark.")


def _main(
    recipes: Mapping[str, Callable[[], AnyRecipe]], args: Sequence[str] | None, about: str
) -> int:
    recipe = choose(recipes, sys.argv[1:] if args is None else args, about)
    return exit_status("error", lambda: _run(recipe))


def _run(recipe: AnyRecipe) -> int:
    """Run a recipe. Imports its protocol alone; help and error messages need neither it nor torch.

    Returns:
        The exit status: 0, or that of a run that a signal stopped.
    """
    from rotpred.distributed import process_group
    from rotpred.training.loop import STOP_STATUS, Stopped

    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash inside a library shows where each thread was
    try:
        with process_group(recipe.run.device, timeout_seconds=recipe.run.timeout) as rank:
            configure_logging(rank=rank.rank)
            match recipe:
                case Pretrain():
                    from rotpred.protocols import pretrain

                    pretrain.run(recipe, rank)
                case Linear():
                    from rotpred.protocols import linear

                    linear.run(recipe, rank)
                case FineTuning():
                    from rotpred.protocols import finetune

                    finetune.run(recipe, rank)
                case Detection():
                    from rotpred.protocols import detection

                    detection.run(recipe, rank)
                case Segmentation():
                    from rotpred.protocols import segmentation

                    segmentation.run(recipe, rank)
                case Svm():
                    from rotpred.protocols import svm

                    svm.run(recipe, rank)
                case LowShot():
                    from rotpred.protocols import svm

                    svm.run_low_shot(recipe, rank)
                case Knn():
                    from rotpred.protocols import knn

                    knn.run(recipe, rank)
                case Rotation():
                    from rotpred.protocols import rotation

                    rotation.run(recipe, rank)
    except Stopped as stop:
        logger.warning("%s", stop)
        return STOP_STATUS
    return 0
