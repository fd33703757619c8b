"""Every protocol that trains refuses a SyncBN that is impossible, before it opens anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rotpred.distributed import Rank
from rotpred.protocols import detection, finetune, linear, pretrain, segmentation
from rotpred.recipes.detection import Detection
from rotpred.recipes.finetune import FineTuning
from rotpred.recipes.linear import Linear
from rotpred.recipes.pretrain import Pretrain
from rotpred.recipes.segmentation import Segmentation
from rotpred.training.settings import SyncBn


@pytest.mark.parametrize("kind", ["torch", "apex"])
@pytest.mark.parametrize(
    ("run", "recipe"),
    [
        (pretrain.run, Pretrain),
        (linear.run, Linear),
        (finetune.run, FineTuning),
        (detection.run, Detection),
        (segmentation.run, Segmentation),
    ],
    ids=lambda value: value.__name__,
)
def test_sync_bn_on_cpus_is_refused_before_any_data_are_opened(
    run: Callable[..., Path], recipe: type[Any], kind: SyncBn, tmp_path: Path
) -> None:
    # No process group: a protocol that gets further fails in another way.
    made = recipe()
    made = replace(
        made,
        sync_bn=kind,
        train=replace(made.train, root=str(tmp_path / "absent")),
        run=replace(made.run, out=str(tmp_path / "run"), device="cpu"),
    )
    with pytest.raises(ValueError, match=f"sync_bn={kind} needs GPUs: .* --sync-bn off"):
        run(made, Rank(world=2))
    assert not list(tmp_path.iterdir())
