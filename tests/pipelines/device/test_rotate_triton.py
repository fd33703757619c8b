"""The Triton kernels without a GPU: run by Triton's interpreter, compiled for A100 and H100.

The interpreter must be selected before Triton is imported, so this file runs itself as a program.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.batch import Regions
from pipelines.device import rotate_cpu
from pipelines.device.rotate import normalize_views
from pipelines.spec import IMAGENET, Normalize

pytest.importorskip("triton", reason="no GPU kernels without Triton")

pytestmark = pytest.mark.timeout(200)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(20, 23), (1, 5), (17, 17)]  # smaller, larger, unchanged


def reference(crops: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reference views (4, B, S, S, 3), by the definition."""
    mean, std = (torch.tensor(v) for v in (IMAGENET.mean, IMAGENET.std))
    plain = ((crops.float() - mean) * (1.0 / std)).to(dtype)
    return torch.stack([torch.rot90(plain, k, (1, 2)) for k in range(4)])


def some_regions(side: int) -> Regions:
    """Noise, with gaps between the regions."""
    offsets, end = [], 5
    for height, width in SHAPES:
        offsets.append(end)
        end += height * width * 3 + 7
    draw = np.random.default_rng(side)
    return Regions(
        torch.from_numpy(draw.integers(0, 256, end, np.uint8)),
        torch.tensor(offsets),
        torch.tensor(SHAPES, dtype=torch.int32),
        torch.tensor([True, False, True]),
        side,
    )


def check_crops() -> None:
    from pipelines.device import rotate_triton

    cases = [(33, 4, "fp32"), (5, 4, "bf16"), (5, 4, "fp16"), (33, 1, "fp16")]
    for side, views, precision in cases:
        dtype, generator = DTYPES[precision], torch.Generator().manual_seed(side)
        crops = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=generator)
        out = torch.full((views, 2, side, side, 3), float("nan"), dtype=dtype)
        rotate_triton.write_views(crops, out, normalize=IMAGENET)
        expected = reference(crops, dtype)[:views]
        if precision == "bf16":
            # The interpreter truncates where the hardware rounds: one unit in the last place.
            apart = out.view(torch.int16).int() - expected.view(torch.int16).int()
            assert apart.abs().max() <= 1
        else:
            assert torch.equal(out, expected), (side, views, precision)


def check_regions() -> None:
    from pipelines.device import rotate_triton

    regions = some_regions(side=17)
    size = (4, len(SHAPES), 17, 17, 3)
    there, here = torch.full(size, float("nan")), torch.empty(size)
    pixels = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    rotate_triton.write_views(regions, there, normalize=pixels)
    rotate_cpu.write_views(regions, here, normalize=pixels)
    apart = (there - here).abs()
    assert apart.max() <= 1 and apart.mean() < 0.05
    assert torch.equal(there[:, 2], here[:, 2])  # of the right size: copied
    # Columns of a table as `pipelines.device.transfer` slices them: transposed, strided, int64.
    table = torch.stack([regions.offsets, *regions.shapes.long().T, regions.flips.long()], 1)
    shapes = table.T.contiguous()[1:3].T
    assert shapes.stride() == (1, len(SHAPES)) and not table[:, 0].is_contiguous()
    strided = regions._replace(offsets=table[:, 0], shapes=shapes, flips=table[:, 3] != 0)
    again = torch.full(size, float("nan"))
    for given in (shapes, shapes.int()):  # a cast keeps the strides
        rotate_triton.write_views(strided._replace(shapes=given), again, normalize=pixels)
        assert torch.equal(again, there)


@pytest.mark.parametrize("check", ["check_crops", "check_regions"])
def test_kernels_under_the_interpreter(check: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__)), check],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{check} passed\n"


@pytest.mark.parametrize("side", ["i32", "constexpr"])
@pytest.mark.parametrize(("precision", "capability"), [("fp16", 80), ("bf16", 90)])
def test_kernels_compile_without_a_gpu(
    precision: str, capability: int, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For A100 and H100, down to PTX: round to nearest, no fused operations.

    A side of 1 is a constant, because Triton's launcher specialises every argument equal to 1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipelines.device import rotate_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    crops = {"crops": "*u8"}
    regions = {"source": "*u8", "offsets": "*i64", "shapes": "*i32", "flips": "*i1"}
    common = {"out": f"*{precision}", "constants": "*fp32", "batch": "i32", "side": side}
    for kernel, inputs in (
        (rotate_triton._rotate_crops, crops),
        (rotate_triton._rotate_regions, regions),
    ):
        signature = {**inputs, **common, "VIEWS": "constexpr", "TILE": "constexpr"}
        values = {(len(signature) - 2,): 4, (len(signature) - 1,): 16}
        if side == "constexpr":
            values[(list(signature).index("side"),)] = 1
        compiled = triton.compile(
            ASTSource(kernel, signature=signature, constexprs=values),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4, "enable_fp_fusion": False},
        )
        ptx = compiled.asm["ptx"]
        assert not re.search(r"\bfma\.\w+\.f32", ptx)
        assert f"cvt.rn.{precision.replace('fp', 'f')}.f32" in ptx


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
@pytest.mark.parametrize("side", [1, 31, 32, 33, 160, 224])
def test_crops_on_a_gpu_equal_the_definition(side: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(side)
    crops = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8, generator=generator)
    for views in (1, 4):
        found = normalize_views(crops.cuda(), views=views, normalize=IMAGENET, dtype=dtype)
        expected = reference(crops, dtype)[:views].flatten(0, 1).permute(0, 3, 1, 2)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
def test_a_batch_of_more_than_two_to_the_31_words_on_a_gpu() -> None:
    side, batch = 512, 800
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of free GPU memory")
    crops = torch.zeros(batch, side, side, 3, dtype=torch.uint8, device="cuda")
    crops[-1] = torch.arange(side, device="cuda").remainder(256).to(torch.uint8)[:, None, None]
    found = normalize_views(crops, views=4, normalize=IMAGENET, dtype=torch.bfloat16)
    expected = reference(crops[-1:].cpu(), torch.bfloat16)[:, 0].permute(0, 3, 1, 2)
    assert torch.equal(found[batch - 1 :: batch].cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [17, 64, 224])
def test_regions_on_a_gpu_equal_those_on_the_cpu(side: int) -> None:
    here = some_regions(side)
    columns = (column.cuda() for column in (here.pixels, here.offsets, here.shapes, here.flips))
    pixels = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    found, expected = (
        normalize_views(regions, views=4, normalize=pixels, dtype=torch.float32).cpu()
        for regions in (Regions(*columns, side), here)
    )
    apart = (found - expected).abs()
    assert apart.max() <= 1 and apart.mean() < 0.05


@pytest.mark.gpu
def test_views_may_be_captured_into_a_graph() -> None:
    crops = torch.zeros(2, 40, 40, 3, dtype=torch.uint8, device="cuda")
    out = torch.empty(8, 3, 40, 40, dtype=torch.float16, device="cuda")
    out = out.contiguous(memory_format=torch.channels_last)
    options = {"views": 4, "normalize": IMAGENET, "dtype": torch.float16, "out": out}
    normalize_views(crops, **options)  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normalize_views(crops, **options)  # type: ignore[arg-type]
    crops.random_(0, 256)
    graph.replay()
    expected = reference(crops.cpu(), torch.float16).flatten(0, 1).permute(0, 3, 1, 2)
    assert torch.equal(out.cpu(), expected)


def repair_interpreter() -> None:
    """Make Triton 3.6's interpreter read loop bounds with numpy 2.4 and newer, as Triton 3.7 does.

    It makes an integer of an array of shape (1,), which numpy then refuses. No GPU is concerned.
    """
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_repair


if __name__ == "__main__":
    repair_interpreter()
    {"check_crops": check_crops, "check_regions": check_regions}[sys.argv[1]]()
    sys.stdout.write(f"{sys.argv[1]} passed\n")
