"""Recipes against the published configurations; refused values; command-line help."""

from __future__ import annotations

import errno
import inspect
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.spec import CIFAR10, LoaderSpec, RandomResizedCrop, Shard
from rotpred import cli
from rotpred.models.backbone import BACKBONES
from rotpred.recipes import finetune, knn, linear, svm
from rotpred.recipes.every import EVALUATION, PRETRAINING
from rotpred.recipes.linear import Linear
from rotpred.recipes.pretrain import (
    RECIPES,
    rotnet_cifar10_nin,
    rotnet_in1k_alexnet,
    rotnet_in1k_r50,
    rotnet_in1k_r50_amp,
    rotnet_in1k_r50_fast,
)
from rotpred.report.recipe_changes import PROCESSES
from rotpred.training.schedule import Steps, lr_at
from rotpred.training.settings import RunSettings

pytestmark = pytest.mark.timeout(60)


def rate(recipe: object, epoch: float, images: int) -> float:
    made = asdict(recipe)  # type: ignore[call-overload]
    lr = recipe.optim.lr_for(images)  # type: ignore[attr-defined]
    return lr_at(recipe.schedule, lr, epoch, made["run"]["epochs"])  # type: ignore[attr-defined]


def test_mmselfsup_resnet50() -> None:
    """8 x 16 images, SGD 0.2 after 5 epochs from 0.02, x0.1 at 30 and 50, 70 epochs, SyncBN."""
    recipe = rotnet_in1k_r50()
    assert recipe.train.batch_size * 8 == 128
    assert recipe.train.crop == RandomResizedCrop(224)
    assert (recipe.sync_bn, recipe.run.epochs, recipe.run.precision) == ("torch", 70, "fp32")
    assert (recipe.optim.momentum, recipe.optim.weight_decay) == (0.9, 1e-4)
    assert recipe.optim.decay_rule == "all" and not recipe.optim.nesterov
    for epoch, lr in ((0, 0.02), (5, 0.2), (29.9, 0.2), (30, 0.02), (50, 0.002), (69, 0.002)):
        assert rate(recipe, epoch, 128) == pytest.approx(lr, rel=0.02), epoch
    assert rate(recipe, 10, 256) == pytest.approx(0.4)


def test_amp_sibling_differs_in_precision_only() -> None:
    plain, mixed = asdict(rotnet_in1k_r50()), asdict(rotnet_in1k_r50_amp())
    changed = {name for name in plain if plain[name] != mixed[name]}
    assert changed == {"name", "run"}
    assert mixed["run"] == {**plain["run"], "precision": "bf16"}


def test_fast_sibling_spends_a_third_of_the_pixels() -> None:
    recipe, base = rotnet_in1k_r50_fast(), rotnet_in1k_r50()
    sides = [recipe.train.side(epoch) for epoch in range(recipe.run.epochs)]
    assert (sides[0], sides[13], sides[14], sides[27], sides[28]) == (128, 128, 192, 192, 224)
    assert sum((side / 224) ** 2 for side in sides) / base.run.epochs < 0.32
    # The same peak rate per image of a step.
    assert rate(recipe, 5, 1024) / 1024 == pytest.approx(rate(base, 5, 128) / 128)
    assert rate(recipe, 34.99, 1024) < 0.01
    assert recipe.val == base.val and recipe.backbone == base.backbone


@pytest.mark.parametrize(
    ("recipe", "images", "table"),
    [
        (rotnet_in1k_alexnet(), 192, {0: 0.01, 14: 0.01, 15: 1e-3, 30: 1e-4, 45: 1e-5}),
        (rotnet_cifar10_nin(), 128, {0: 0.1, 59: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008}),
    ],
)
def test_the_authors_recipes(recipe: object, images: int, table: dict[int, float]) -> None:
    """Rates that the paper's code applies, not the nominal 0.1 of its AlexNet file."""
    for epoch, lr in table.items():
        assert rate(recipe, epoch, images) == pytest.approx(lr)
    made = asdict(recipe)  # type: ignore[call-overload]
    assert made["train"]["batch_size"] == images
    assert made["optim"]["nesterov"] and made["optim"]["weight_decay"] == 5e-4


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name and recipe.backbone in BACKBONES
    assert recipe.train.views == "rotate4" and recipe.train.shuffle and recipe.train.drop_last
    assert recipe.val is not None
    assert not (recipe.val.flip or recipe.val.shuffle or recipe.val.drop_last)
    assert recipe.val.normalize == recipe.train.normalize
    assert ("cifar10" in name or name == "quickstart") == (recipe.train.normalize == CIFAR10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RunSettings(epochs=0), "epochs"),
        (lambda: RunSettings(keep_checkpoints=1), "keep"),
        (lambda: RunSettings(max_steps=0), "max_steps"),
        (lambda: RunSettings(profile=-1), "profile"),
        (lambda: LoaderSpec(batch_size=0), "batch_size"),
        (lambda: LoaderSpec(max_samples=0), "max_samples"),
        (lambda: LoaderSpec(timeout=0), "timeout"),
        (lambda: Shard(2, 2), "rank 2"),
    ],
)
def test_senseless_values_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


EVALUATIONS = {**linear.RECIPES, **finetune.RECIPES, **svm.RECIPES, **knn.RECIPES}


@pytest.mark.parametrize("name", sorted(EVALUATIONS))
def test_evaluate_runs_the_protocol_of_the_recipe(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the docstring, with one option changed, calls the function of its protocol."""
    made = EVALUATIONS[name]()
    text = inspect.getdoc(EVALUATIONS[name])
    assert text is not None and "\nSource: " in text
    assert re.search(rf"scripts/evaluate\.py {name} (--grid )?--weights FILE", text)
    met: list[object] = []
    for place in ("linear.run", "finetune.run", "svm.run", "svm.run_low_shot", "knn.run"):
        monkeypatch.setattr(
            f"rotpred.protocols.{place}", lambda recipe, _rank, p=place: met.extend((p, recipe))
        )
    args = [name, "--weights", "x.safetensors", "--run.device", "cpu", "--train.seed", "7"]
    assert cli.evaluate_main(args) == 0
    where = {
        Linear: "linear.run",
        finetune.FineTuning: "finetune.run",
        svm.Svm: "svm.run",
        svm.LowShot: "svm.run_low_shot",
        knn.Knn: "knn.run",
    }
    assert met[0] == where[type(made)]
    expected = replace(
        made,
        weights="x.safetensors",
        train=replace(made.train, seed=7),
        run=replace(made.run, device="cpu"),
    )
    assert met[1] == expected


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), TimeoutError("no batch for 600 s")]
)
def test_what_the_machine_lacks_is_one_line(
    error: OSError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("rotpred.protocols.knn.run", fails)
    args = ["in1k_knn", "--weights", "x.safetensors", "--run.device", "cpu"]
    assert cli.evaluate_main(args) == 2
    assert capsys.readouterr().err == f"error: {error} (ROTPRED_DEBUG=1 shows where)\n"


def test_readme_names_every_recipe() -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text()
    assert [name for name in (*PRETRAINING, *EVALUATION) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_commands_have_the_published_number_of_processes(name: str) -> None:
    text = inspect.getdoc({**PRETRAINING, **EVALUATION}[name])
    assert text is not None and f"--nproc-per-node {PROCESSES[name]} scripts/" in text


def test_variants_of_the_docstrings_are_options() -> None:
    """The flags that in1k_mhead names for VISSL's protocol, taken from its docstring."""
    text = inspect.getdoc(linear.in1k_mhead)
    assert text is not None
    flags = " ".join(text.split("yaml)")[1].split("Command:")[0].split())
    flags = flags[flags.index("--") :]
    made = cli.choose(linear.RECIPES, ["in1k_mhead", *flags.split()], "")
    (probe,) = made.probes
    assert (probe.affine, probe.optim.weight_decay, probe.optim.decay_rule) == (
        True, 5e-4, "no_norm",
    )  # fmt: skip
    assert made.run.epochs == 28 and probe.schedule == Steps((8, 16, 24), gamma=0.1)
    assert not made.train.color_jitter.active
    sweep = cli.choose(linear.RECIPES, ["in1k_linear", "--probes.0.lrs", "3", "10", "30"], "")
    assert sweep.probes[0].lrs == (3.0, 10.0, 30.0)


VARIANTS: dict[str, list[tuple[str, str, object]]] = {
    "in1k_linear": [
        ("--run.precision fp32", "run.precision", "fp32"),
        ("--probes.0.optim.nesterov", "probes.0.optim.nesterov", True),
    ],
    "in1k_mhead": [("--run.precision fp32", "run.precision", "fp32")],
    "inat18_mhead": [
        ("--run.precision fp32", "run.precision", "fp32"),
        ("--probes.0.affine", "probes.0.affine", True),
        ("--probes.0.optim.weight-decay 5e-4", "probes.0.optim.weight_decay", 5e-4),
        ("--probes.0.optim.decay-rule no_norm", "probes.0.optim.decay_rule", "no_norm"),
    ],
    "places205_mhead": [("--run.precision fp32", "run.precision", "fp32")],
    "places205_mhead_vissl": [("--run.precision fp32", "run.precision", "fp32")],
    "cifar10_probes": [("--run.precision fp32", "run.precision", "fp32")],
    "voc07_svm": [
        (
            "--costs 0.01 0.1 1 2 5 10 15 20 50 100 1000",
            "costs",
            (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
        )
    ],
    "in1k_knn": [
        ("--store float32", "store", "float32"),
        ("--no-normalize", "normalize", False),
        ("--temperature 0.1", "temperature", 0.1),
        ("--neighbours 200", "neighbours", (200,)),
    ],
}


def field(recipe: Any, path: str) -> object:
    for part in path.split("."):
        recipe = recipe[int(part)] if part.isdecimal() else getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_what_is_ours_can_be_as_published(name: str) -> None:
    """Each option that a docstring names appears there literally and changes its field."""
    text = " ".join((inspect.getdoc(EVALUATIONS[name]) or "").split())
    flags = [flag for flag, _, _ in VARIANTS[name]]
    assert all(flag in text for flag in flags)
    made = cli.choose(EVALUATIONS, [name, *" ".join(flags).split()], "")
    for _, path, value in VARIANTS[name]:
        assert field(made, path) == value and field(EVALUATIONS[name](), path) != value, path


@pytest.mark.parametrize(
    ("main", "name", "words"),
    [
        ("evaluate", "in1k_lineer", ": did you mean in1k_linear,"),
        ("evaluate", "voc7_svm", ": did you mean voc07_svm?"),
        ("evaluate", "zzz", " ("),
        ("pretrain", "rotnet_in1k_r5", ": did you mean rotnet_in1k_r50"),
        ("pretrain", "in1k_linear", " ("),
    ],
)
def test_a_mistyped_recipe_gets_one_line(
    main: str, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2; the options after it are not parsed."""
    with pytest.raises(SystemExit) as leave:
        getattr(cli, f"{main}_main")([name, "--weights", "x", "--no-such-option"])
    out, err = capsys.readouterr()
    assert (leave.value.code, out) == (2, "")
    assert err.startswith(f"error: no recipe '{name}'{words}") and err.count("\n") == 1
    assert err.endswith(" without arguments lists all)\n")


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_without_a_recipe_the_table_of_recipes_is_printed(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Name, summary and data of each; the help of one recipe has its whole docstring."""
    with pytest.raises(SystemExit) as leave:
        cli.evaluate_main(args)
    listed, err = capsys.readouterr()
    assert (leave.value.code, err) == (0, "")
    assert all(f"\n  {name} " in listed for name in EVALUATION) and "Source:" not in listed
    assert "data/imagenet/{train,val}.beton" in listed
    assert len(listed.splitlines()) < 4 * len(EVALUATION) + 15


def test_the_help_of_a_recipe_has_its_whole_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.evaluate_main(["voc12aug_seg", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n\n{word}: " in text for word in ("Source", "Note", "Command"))
    assert "voc12aug/fcn_r50-d8_4xb4-20k_voc12aug-512x512.py" in text  # over two lines there


@pytest.mark.parametrize("args", [[], ["--help"], ["in1k_linear", "--help"]])
def test_only_the_first_process_prints_help(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, printed in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as leave:
            cli.evaluate_main(args)
        out, err = capsys.readouterr()
        assert (leave.value.code, bool(out), err) == (0, printed, "")


@pytest.mark.parametrize(
    ("args", "words", "summary"),
    [
        (["in1k_lineer"], "error: no recipe 'in1k_lineer': did you mean in1k_linear", ""),
        (["in1k_linear", "--run.epoch", "3"], "--run.epochs", "invalid options for in1k_linear"),
        (["in1k_linear", "--val.limit", "3"], "error: --val.limit is now --val.max-samples", ""),
        (["coco_det", "--val.max-bad=1"], "is now --val.max-invalid-annotations=1", ""),
    ],
)
def test_a_mistake_is_printed_by_whichever_process_is_first(
    args: list[str],
    words: str,
    summary: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torchrun ends the others as soon as one has failed: none may rely on rank 0."""
    for rank in ("1", "0"):
        file = tmp_path / "attempt_0" / rank / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        with pytest.raises(SystemExit) as leave:
            cli.evaluate_main(args)
        out, err = capsys.readouterr()
        assert (leave.value.code, out, words in err) == (2, "", rank == "1")
        assert (summary or words) in json.loads(file.read_text())["message"]["message"]
