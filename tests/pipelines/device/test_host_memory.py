"""Host memory of batches: reused once nobody holds it, and never before."""

from __future__ import annotations

import pytest
import torch

from pipelines.device.host_memory import BufferPool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout(dtype: torch.dtype) -> None:
    images = BufferPool().images(8, 5, dtype)
    assert images.shape == (8, 3, 5, 5) and images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_memory_that_is_held_is_not_handed_out() -> None:
    pool = BufferPool()
    held = [pool.images(4, 3, torch.float32).fill_(k) for k in range(6)]
    assert len({images.data_ptr() for images in held}) == 6
    assert [float(images.mean()) for images in held] == list(range(6))


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    pool = BufferPool()
    images = pool.images(4, 3, torch.float32)
    place, part = images.data_ptr(), images[1:2]
    del images
    assert pool.images(4, 3, torch.float32).data_ptr() != place, "a view still needs it"
    del part
    taken = {pool.images(4, 3, torch.float32).data_ptr() for _ in range(2)}
    assert place in taken


def test_autograd_keeps_what_it_saved() -> None:
    pool = BufferPool()
    weight = torch.ones(3, requires_grad=True)
    loss = (pool.images(2, 1, torch.float32).fill_(2.0) * weight.view(1, 3, 1, 1)).sum()
    pool.images(2, 1, torch.float32).fill_(7.0)
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [4.0, 4.0, 4.0]


def test_another_size_replaces_what_was_kept() -> None:
    pool = BufferPool()
    pool.images(4, 3, torch.float32).zero_()
    assert pool.images(4, 5, torch.float32).shape == (4, 3, 5, 5)
