"""``scale_grad_`` over every backend; ``kd_loss``'s tests cover its use in a backward pass."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import Backend
from helpers.budget import assert_within_budget

from kdkernels.ops.scale_grad import scale_grad_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 70), (5, 1025)])
def test_matches_reference(backend: Backend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend} does not take {dtype}")
    grad = torch.randn(shape).to(dtype).to(backend.device)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for factor in (1.0, 0.0, -2.5):
        scale = torch.tensor(factor, dtype=accumulate, device=backend.device)
        oracle, actual = grad.double() * factor, grad.clone()
        scale_grad_(backend.name, actual, scale)
        assert_within_budget(actual, oracle, grad * factor, dtype)
        if factor == 1.0:
            assert torch.equal(actual, grad)


def test_rows_with_a_stride(backend: Backend) -> None:
    wide = torch.ones(4, 50, device=backend.device)
    scale_grad_(backend.name, wide[:, :33], torch.tensor(3.0, device=backend.device))
    assert (wide[:, :33] == 3).all() and (wide[:, 33:] == 1).all()


def test_opcheck(backend: Backend) -> None:
    args = (torch.randn(3, 9, device=backend.device), torch.tensor(2.0, device=backend.device))
    torch.library.opcheck(scale_grad_.overload(backend.name), args)


def test_refusals() -> None:
    with pytest.raises(RuntimeError, match="scale_grad: scale must have one element, got 2"):
        scale_grad_("native", torch.ones(2, 2), torch.ones(2))
    with pytest.raises(RuntimeError, match="scale_grad: scale must be float32 or float64"):
        scale_grad_("native", torch.ones(2, 2), torch.ones((), dtype=torch.float16))
