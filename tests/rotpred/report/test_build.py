"""The results page: every cell of its tables, from rows as runs write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rotpred.report import published
from rotpred.report.page import NOT_RUN, Text
from rotpred.report.results import read_runs
from tests.support.report_pages import blocks_of, rendered, rows, table

pytestmark = pytest.mark.timeout(120)


Make = Callable[..., Path]


def test_published_numbers_are_those_of_the_sources() -> None:
    def number(title: str, cell: str, source: str) -> str:
        (one,) = [t for t in published.TABLES if t.title.startswith(title)]
        (row,) = [c for c in one.cells if c.name == cell]
        return {s.name: text for s, text in row.published.items()}[source]

    zoo, mm = "OpenSelfSup", "mmselfsup"
    for title, cell, source, expected in (
        ("VOC07 classification, linear SVM", "best of Feature1-5", mm, "67.70"),
        ("VOC07 classification, low-shot", "Feature4 (res4), k = 1", mm, "20.60"),
        ("VOC07 classification, low-shot", "Feature4 (res4), k = 96", mm, "62.42"),
        ("VOC07 classification, low-shot", "Feature4 (res4), k = 96", zoo, "61.11"),
        ("ImageNet-1k, linear", "Feature1 (stem)", mm, "12.15"),
        ("ImageNet-1k, linear", "Feature4 (res4)", mm, "54.20"),
        ("ImageNet-1k, linear", "AvgPool", mm, "47.0"),
        ("ImageNet-1k, linear", "AvgPool", f"{zoo}, random", "4.35"),
        ("ImageNet-1k, linear", "Feature5 (res5)", f"{zoo}, supervised", "76.17"),
        ("Places205", "Feature4 (res4)", mm, "46.30"),
        ("ImageNet-1k, semi", "1 %, top-1", zoo, "18.98"),
        ("ImageNet-1k, semi", "1 %, top-5", zoo, "44.05"),
        ("ImageNet-1k, semi", "10 %, top-1", f"{zoo}, random", "21.78"),
        ("ImageNet-1k, weighted", "k = 100", mm, "12.6"),
        ("VOC07+12", "AP50", mm, "79.67"),
        ("VOC07+12", "AP75", zoo, "61.39"),
        ("COCO", "box AP", mm, "37.9"),
        ("COCO", "mask AP75", mm, "36.7"),
        ("COCO", "mask AP50", f"{zoo}, C4 2x", "56.0"),
        ("VOC12+Aug", "mIoU", mm, "64.31"),
        ("CIFAR-10, probes", "conv2, non-linear", "paper", "89.06"),
    ):
        assert number(title, cell, source) == expected, (title, cell, source)


def test_stages_and_average_pool_of_two_recipes_fill_one_table(make_run: Make) -> None:
    stages = {"top1/stem": 10.5, "top1/res4": 55.25, "top5/res4": 78.0}
    trained = make_run("mhead", "in1k_mhead", rows(stages))
    pool = make_run("pool", "in1k_linear", rows({"top1/avgpool": 46.9}))
    control = {"top1/stem": 11.0, "top1/res4": 9.125}
    random = make_run("random", "in1k_mhead", rows(control), weights="random")
    text = rendered(trained, pool, random)
    cells = table(text, "ImageNet-1k, linear")
    assert cells["Feature1 (stem)"] == {
        "trained": "10.50", "random": "11.00", "difference": "-0.50", "mmselfsup": "12.15",
        "OpenSelfSup": "12.89", "OpenSelfSup, random": "11.37", "OpenSelfSup, supervised": "15.18",
    }  # fmt: skip
    assert [*cells["Feature4 (res4)"].values()][:4] == ["55.25", "9.12", "+46.12", "54.20"]
    assert [*cells["Feature5 (res5)"].values()][:3] == [NOT_RUN, NOT_RUN, "–"]
    assert [*cells["AvgPool"].values()][:4] == ["46.90", NOT_RUN, "–", "47.0"]
    assert table(text, "ImageNet-1k, linear", 1) == {
        "top5/res4": {"trained": "78.00", "random": NOT_RUN, "difference": "–"}
    }
    section = text.partition("## ImageNet-1k, linear")[2].partition("\n## ")[0]
    assert "Config: in1k\\_linear" not in section and "Config: in1k_linear, in1k_mhead" in section
    commands = section.partition("```\n")[2].partition("\n```")[0].splitlines()
    start = "torchrun --standalone --nproc-per-node"
    assert commands == [
        "# trained: pool",
        f"{start} 8 scripts/evaluate.py in1k_linear --weights runs/x/backbone.safetensors",
        "# trained: mhead",
        f"{start} 8 scripts/evaluate.py in1k_mhead --weights runs/x/backbone.safetensors",
        "# random: not run",
        f"{start} 8 scripts/evaluate.py in1k_linear --weights random",
        "# random: random",
        f"{start} 8 scripts/evaluate.py in1k_mhead --weights random",
    ]
    assert "three checkpoints" in text and "48.12" in text
    runs = table(text, "Runs")
    assert runs["mhead"]["weights (sha256)"] == "backbone.safetensors abababababab"
    assert runs["random"]["weights (sha256)"] == "random"
    assert (runs["pool"]["processes"], runs["pool"]["revision"]) == ("8", "0123456789ab + changes")


def test_rows_of_frozen_features(make_run: Make) -> None:
    """SVM with both kinds of AP, low-shot with its deviation, nearest neighbours."""
    svm = {"mAP/res3": 50.0, "mAP/res4": 66.5, "mAP/avgpool": 70.0, "mAP11/res4": 65.125}
    shots = [
        {"metric": f"mAP/res4/k={k}", "value": value, "deviation": 0.345, "cost": 1.0, "draws": 5}
        for k, value in ((1, 21.5), (96, 60.0))
    ]
    text = rendered(
        make_run("svm", "voc07_svm", rows(svm)),
        make_run("shots", "voc07_lowshot", shots),
        make_run("knn", "in1k_knn", rows({"top1/k=20": 12.0, "top5/k=20": 30.0}), weights="random"),
    )
    cells = table(text, "VOC07 classification, linear SVM")
    assert cells["best of Feature1-5"]["trained"] == "66.50 (res4)"  # not the average pool
    assert cells["best of Feature1-5, 11-point AP"]["trained"] == "65.12 (res4)"
    assert cells["Feature3 (res3)"]["trained"] == "50.00"
    assert cells["AvgPool"] | {"trained": "70.00"} == cells["AvgPool"]
    cells = table(text, "VOC07 classification, low-shot")
    assert cells["Feature4 (res4), k = 1"]["trained"] == "21.50 ± 0.34"
    assert cells["Feature4 (res4), k = 96"]["mmselfsup"] == "62.42"
    cells = table(text, "ImageNet-1k, weighted")
    assert cells["k = 20"] == {
        "trained": NOT_RUN, "random": "12.00", "difference": "–", "mmselfsup": "11.9"
    }  # fmt: skip


def test_grid_of_fine_tuning_reports_its_best_and_all_points(make_run: Make) -> None:
    points = [((0.1, 1.0), 15.0), ((0.01, 100.0), 19.5)]
    grid = [
        {"metric": f"top1/lr={lr:g},head={mult:g}", "value": value, "fraction": 0.01, "lr": lr,
         "head_lr_mult": mult, "best": value == 19.5}
        for (lr, mult), value in points
    ]  # fmt: skip
    best = {"fraction": 0.01, "lr": 0.01, "head_lr_mult": 100.0, "chosen_from": 2}
    grid += rows({"top1": 19.5, "top5": 44.0}, **best)
    # A grid has no done.json: its points have one, and its last row marks the end.
    semi = make_run("semi", "in1k_semi_1", grid, fields={"grid": True}, done=False)
    text = rendered(semi)
    cells = table(text, "ImageNet-1k, semi")
    assert cells["1 %, top-1"]["trained"] == "19.50 (lr 0.01, head_lr_mult 100.0, best of 2)"
    assert cells["1 %, top-5"]["OpenSelfSup"] == "44.05"
    assert cells["10 %, top-1"]["trained"] == NOT_RUN
    rest = table(text, "ImageNet-1k, semi", 1)
    assert {name: row["trained"] for name, row in rest.items()} == {
        "top1/lr=0.1,head=1": "15.00", "top1/lr=0.01,head=100": "19.50"
    }  # fmt: skip
    assert "4 scripts/evaluate.py in1k_semi_10 --grid --weights FILE" in text
    half = make_run("half", "in1k_semi_1", grid[:2], fields={"grid": True}, done=False)
    with pytest.raises(ValueError, match="unfinished"):
        read_runs(half)


def test_the_best_of_a_grid_is_one_row_whichever_point_it_is(make_run: Make) -> None:
    for metric, recipe, title in (
        ("top1", "cifar10_semi_1", "CIFAR-10, fine-tuning on 1 %"),
        ("top1/res2", "cifar10_linear", "CIFAR-10, linear classifiers"),
    ):
        chosen = [
            make_run(f"{recipe}-{weights}", recipe, rows({metric: value}, lr=lr, chosen_from=3),
                 weights=weights, fields={"backbone": "resnet18_tiny"})
            for weights, value, lr in (("weights.safetensors", 45.0, 0.01), ("random", 38.5, 0.1))
        ]  # fmt: skip
        assert table(rendered(*chosen), title) == {
            metric: {
                "trained": "45.00 (lr 0.01, best of 3)",
                "random": "38.50 (lr 0.1, best of 3)",
                "difference": "+6.50",
            }
        }


def test_detection_and_segmentation_rows(make_run: Make) -> None:
    text = rendered(
        make_run("voc", "voc0712_det", rows({"AP50": 79.0, "AP": 54.0, "AP75": 60.0})),
        make_run("coco", "coco_det", rows({"box/AP": 37.0, "mask/AP75": 36.0})),
        make_run("seg", "voc12aug_seg", rows({"mIoU": 64.0})),
        make_run("city", "cityscapes_seg", rows({"mIoU": 70.0}), weights="imagenet"),
    )
    assert table(text, "VOC07+12")["AP50"]["trained"] == "79.00"
    assert table(text, "COCO")["box AP"]["trained"] == "37.00"
    assert table(text, "COCO")["mask AP75"]["trained"] == "36.00"
    assert table(text, "VOC12+Aug")["mIoU"] == {
        "trained": "64.00", "random": NOT_RUN, "difference": "–", "mmselfsup": "64.31"
    }  # fmt: skip
    assert table(text, "Cityscapes")["mIoU"]["supervised"] == "70.00"


def test_other_data_sets_and_protocols_follow_as_they_are(make_run: Make) -> None:
    values = {"top1/avgpool": 44.0, "top1/res2": 64.0}
    cached = rows(values, protocol="features of the validation crop")
    own = {"backbone": "resnet18_tiny"}
    trained = make_run("trained", "cifar10_linear", cached, fields=own)
    scores = rows({"top1/res2": 55.5})
    random = make_run("random", "cifar10_linear", scores, weights="random", fields=own)
    rotation = {"benchmark": "rotation", "metric": "accuracy", "value": 74.5, "chance": 25.0}
    pretext = make_run("pretrain", "rotnet_cifar10_r18", [rotation], weights=None, fields=own)
    text = rendered(trained, random, pretext)
    assert table(text, "CIFAR-10, linear") == {
        "top1/avgpool": {"trained": "44.00†", "random": NOT_RUN, "difference": "–"},
        "top1/res2": {"trained": "64.00†", "random": "55.50", "difference": "+8.50"},
    }
    assert "†: features of the validation crop." in text
    assert table(text, "Rotation prediction")["pretrain"]["accuracy"] == "74.50"
    # Methods with results come before those without.
    assert text.index("## CIFAR-10, linear") < text.index("## ImageNet-1k, linear")
    assert "![trained: curves](trained/figures/curves.png)" in text


def test_the_same_result_twice_is_an_error(make_run: Make) -> None:
    folders = [make_run(name, "in1k_knn", rows({"top1/k=10": 11.0})) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"one.*two.*in1k_knn top1/k=10 of trained"):
        blocks_of(*folders)


def test_results_of_several_weights_are_told(make_run: Make) -> None:
    one = make_run("one", "in1k_linear", rows({"top1/avgpool": 40.0}))
    two = make_run("two", "in1k_mhead", rows({"top1/res4": 50.0}, checkpoint_sha256="cd" * 32))
    warnings = [b.text for b in blocks_of(one, two) if isinstance(b, Text) and b.warning]
    assert "trained results of several weights files: abababababab, cdcdcdcdcdcd." in warnings
