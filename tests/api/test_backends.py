"""Choosing a backend, and being told why."""

from __future__ import annotations

import pytest
import torch

import kdkernels

S = torch.zeros(2, 4)


def test_available_backends() -> None:
    assert "reference" in kdkernels.available_backends("kd_loss")
    on_cuda = kdkernels.available_backends("kd_loss", "cuda")
    assert ("reference" in on_cuda) == torch.cuda.is_available()
    with pytest.raises(
        ValueError, match="op must be one of adamw_average, domain_prototypes, .*got 'softmax'"
    ):
        kdkernels.available_backends("softmax")


def test_explain_names_the_choice_and_the_reasons() -> None:
    text = kdkernels.explain("kd_loss", S, S)
    assert text.splitlines()[0].startswith("kd_loss on cpu: ")
    assert len(text.splitlines()) == 3
    with kdkernels.use_backend("triton"):
        assert "cannot run this call" in kdkernels.explain("kd_loss", S.double(), S.double())
    with pytest.raises(TypeError, match="explain: tensors must be the tensors of the call"):
        kdkernels.explain("kd_loss", 3)
    wide = kdkernels.explain("kd_loss", S.double(), S.double())
    assert "not float64" in wide


def test_use_backend_is_explicit_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    with kdkernels.use_backend("reference"):
        student = S.clone().requires_grad_()
        loss = kdkernels.kd_loss(student, S)
        # Only the reference is differentiable twice.
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        assert grad.requires_grad
    with pytest.raises(ValueError, match="backend must be one of"), kdkernels.use_backend("gpu"):
        pass
    with (
        kdkernels.use_backend("triton"),
        pytest.raises(NotImplementedError, match="cannot run this call.*not float64"),
    ):
        kdkernels.kd_loss(S.double(), S.double())


def test_an_explicit_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels import _native

    monkeypatch.setitem(_native._reasons, "cpu", "it was not built")
    with pytest.raises(
        NotImplementedError, match="'native' cannot run this call: it was not built"
    ):
        kdkernels.kd_loss(S, S, backend="native")
    assert kdkernels.available_backends("kd_loss")[-1] == "reference"
    assert "native: it was not built" in kdkernels.explain("kd_loss", S, S)
    kdkernels.kd_loss(S, S)  # the automatic choice may fall back
