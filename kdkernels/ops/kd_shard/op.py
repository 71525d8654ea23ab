"""The contract of ``kd_shard``: ``kd_loss`` where each process has some of the classes of a row.

Three steps, between which the processes exchange a few numbers a row: what there is to say of the
logits here (:func:`found`), for JSD and TVD sums that need the normalisers of all classes
(:func:`middle`), and the gradient of the logits here (:func:`gradient`). The row kernels are those
of ``kd_loss``, begun and ended elsewhere. Who merges what was found, and makes losses of it, is
``kdkernels.ops._shared.vocab_rows``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import Primitive, transforms_active
from kdkernels.ops.kd_loss.spec import Divergence, Spec
from kdkernels.ops.kd_shard.reference import (
    kd_shard_found_reference,
    kd_shard_grad_reference,
    kd_shard_middle_reference,
)
from kdkernels.ops.kd_shard.spec import IGNORED, Found, Merged

OP = "kd_shard"
_LOWEST = torch.finfo(torch.float32).min
_TWO_STAGES = (Divergence.JSD.value, Divergence.TVD.value)


def _fake_found(student: Tensor, *args: Any) -> Tensor:
    return _numbers(student, len(Found))


def _fake_middle(student: Tensor, *args: Any) -> Tensor:
    return _numbers(student, 2)


def _fake_grad(student: Tensor, *args: Any) -> Tensor:
    return student.new_empty(student.shape)


_INPUTS = "Tensor student, Tensor? teacher, Tensor? places"
kd_shard_found = Primitive(f"{OP}_found", f"({_INPUTS}, float[] spec) -> Tensor", fake=_fake_found)
kd_shard_middle = Primitive(
    f"{OP}_middle", f"({_INPUTS}, Tensor merged, float[] spec) -> Tensor", fake=_fake_middle
)
kd_shard_grad = Primitive(
    f"{OP}_grad", f"({_INPUTS}, Tensor merged, float[] spec) -> Tensor", fake=_fake_grad
)
kd_shard_grad_ = Primitive(
    f"{OP}_grad_",
    f"({_INPUTS}, Tensor merged, float[] spec, Tensor(a!) grad) -> ()",
    fake=None,
)


def choose(caller: str, student: Tensor, teacher: Tensor | None, backend: str | None = None) -> str:
    """The backend of a call, for all of its steps; ``student`` and ``teacher`` are logits, or have
    their dtypes and device.
    """
    return _backend.choose(caller, student.device.type, backend, unsupported, student, teacher)


def found(
    student: Tensor, teacher: Tensor | None, places: Tensor | None, spec: Spec, backend: str
) -> Tensor:
    """The first step: what there is to say of the classes that are here.

    Args:
        student: logits ``[rows, classes here]``, any row stride; float32, bfloat16, float16 or
            (reference) float64. There may be no class.
        teacher: logits of the same shape; ``None`` where ``spec`` needs none.
        places: ``[rows]`` int64, where the label is among the classes here, ``ELSEWHERE`` or
            ``IGNORED``, in a row that does not count; ``None``: every row counts. A row that does
            not count is never read; what is said of it means nothing, but is finite.
        spec: as made by :func:`shard_spec`.
        backend: a name that :func:`choose` gave.

    Returns:
        ``[len(Found), rows]``, see :class:`~kdkernels.ops.kd_shard.spec.Found`; float64 for float64
        logits, else float32.
    """
    _check(student, teacher, places, spec)
    if student.shape[1] == 0:
        numbers = _numbers(student, len(Found)).zero_()
        numbers[[Found.STUDENT_TOP, Found.TEACHER_TOP]] = _LOWEST
        return numbers
    if backend == "reference":
        return kd_shard_found_reference(student, teacher, places, spec)
    result: Tensor = kd_shard_found(backend, _rows(student), _rows(teacher), places, spec)
    return result


def middle(
    student: Tensor,
    teacher: Tensor,
    places: Tensor | None,
    merged: Tensor,
    spec: Spec,
    backend: str,
) -> Tensor:
    """The second step, of JSD and TVD: the classes' part of what the normalisers make.

    Args:
        student: as in :func:`found`.
        teacher: as in :func:`found`.
        places: as in :func:`found`.
        merged: ``[len(Merged), rows]`` in the dtype of the sums; ``MEAN`` is not read.
        spec: as in :func:`found`.
        backend: as in :func:`found`.

    Returns:
        ``[2, rows]``: the value of D, and ``Merged.MEAN``, to be summed over the processes.
    """
    _check(student, teacher, places, spec, merged)
    if spec.divergence not in _TWO_STAGES:
        raise ValueError(f"{OP}: divergence must be JSD or TVD, got {spec.divergence}")
    if student.shape[1] == 0:
        return _numbers(student, 2).zero_()
    if backend == "reference":
        return kd_shard_middle_reference(student, teacher, places, merged, spec)
    result: Tensor = kd_shard_middle(backend, _rows(student), _rows(teacher), places, merged, spec)
    return result


def gradient(
    student: Tensor,
    teacher: Tensor | None,
    places: Tensor | None,
    merged: Tensor,
    spec: Spec,
    backend: str,
) -> Tensor:
    """The last step: the gradient of the loss for the logits here.

    Args:
        student: as in :func:`found`.
        teacher: as in :func:`found`.
        places: as in :func:`found`. Rows that do not count get gradient 0.
        merged: ``[len(Merged), rows]`` in the dtype of the sums.
        spec: as in :func:`found`.
        backend: as in :func:`found`.

    Returns:
        ``[rows, classes here]`` in the student's dtype.
    """
    _check(student, teacher, places, spec, merged)
    if student.shape[1] == 0:
        return torch.zeros_like(student)
    if backend == "reference":
        return kd_shard_grad_reference(student, teacher, places, merged, spec).to(student.dtype)
    result: Tensor = kd_shard_grad(backend, _rows(student), _rows(teacher), places, merged, spec)
    return result


def gradient_(
    student: Tensor,
    teacher: Tensor | None,
    places: Tensor | None,
    merged: Tensor,
    spec: Spec,
    backend: str,
    grad: Tensor,
) -> None:
    """As :func:`gradient`, into memory that is there.

    Args:
        student: as in :func:`found`.
        teacher: as in :func:`found`.
        places: as in :func:`gradient`.
        merged: as in :func:`gradient`.
        spec: as in :func:`found`.
        backend: as in :func:`found`.
        grad: ``[rows, classes here]``, any row stride, in the student's dtype: is overwritten. It
            may be the student itself.
    """
    _check(student, teacher, places, spec, merged)
    if grad.shape != student.shape or grad.dtype != student.dtype:
        raise ValueError(
            f"{OP}: grad must be {list(student.shape)} of {student.dtype}, got "
            f"{list(grad.shape)} of {grad.dtype}"
        )
    if student.shape[1] == 0:
        return
    if backend == "reference":
        grad.copy_(kd_shard_grad_reference(student, teacher, places, merged, spec))
        return
    if grad.stride(1) != 1:
        raise ValueError(f"{OP}: grad must have unit column stride, got {grad.stride(1)}")
    kd_shard_grad_(backend, _rows(student), _rows(teacher), places, merged, spec, grad)


def shard_spec(spec: Spec) -> Spec:
    """The numbers of a call as the three steps take them."""
    return spec._replace(classes=-1, ignore_index=IGNORED, mean=False)


def unsupported(
    backend: str, student: Tensor, teacher: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can."""
    device = device or student.device.type
    if backend == "reference":
        return None
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if torch.float64 in (student.dtype, None if teacher is None else teacher.dtype):
        return "the kernels take float32, bfloat16 and float16, not float64"
    if backend == "native":
        if device == "cuda" and teacher is not None and teacher.dtype != student.dtype:
            return "the CUDA kernel takes student and teacher of one dtype"
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


def _dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def _numbers(student: Tensor, count: int) -> Tensor:
    return student.new_empty((count, student.shape[0]), dtype=_dtype(student))


def _rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def _check(
    student: Tensor,
    teacher: Tensor | None,
    places: Tensor | None,
    spec: Spec,
    merged: Tensor | None = None,
) -> None:
    if student.dim() != 2 or student.dtype not in _checks.FLOAT_DTYPES:
        raise ValueError(
            f"{OP}: student must be floats [rows, classes], got {student.dtype} "
            f"{list(student.shape)}"
        )
    rows = student.shape[0]
    if not 0 <= spec.divergence <= Divergence.TVD.value:
        raise ValueError(f"{OP}: divergence must be one of 0 to 5, got {spec.divergence}")
    if spec.needs_teacher:
        if teacher is None or teacher.shape != student.shape:
            got = None if teacher is None else list(teacher.shape)
            raise ValueError(f"{OP}: teacher must be {list(student.shape)}, got {got}")
        _checks.same_device(OP, "teacher", teacher, student.device)
    if places is None and spec.needs_ce:
        raise ValueError(f"{OP}: places must be given for a loss on labels, got None")
    if places is not None:
        _checks.row_vector(OP, "places", places, rows, (torch.int64,))
        _checks.same_device(OP, "places", places, student.device)
    if merged is not None:
        wide = _dtype(student)
        if merged.shape != (len(Merged), rows) or merged.dtype != wide:
            raise ValueError(
                f"{OP}: merged must be {[len(Merged), rows]} of {wide}, got {list(merged.shape)} "
                f"of {merged.dtype}"
            )
        if not merged.is_contiguous():
            raise ValueError(f"{OP}: merged must be contiguous, got strides {merged.stride()}")
        _checks.same_device(OP, "merged", merged, student.device)
