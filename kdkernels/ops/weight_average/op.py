"""The contract of ``weight_average``: running averages of lists of tensors, in place.

Layers above (``kdkernels.api``) bring models, schedules and step counters; here everything is a
:class:`~kdkernels.ops.weight_average.plan.Plan` and one weight that stays on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import _backend, _checks
from kdkernels._op import Primitive
from kdkernels.ops._shared.multi_tensor import unsupported
from kdkernels.ops.weight_average.plan import OP, Plan
from kdkernels.ops.weight_average.reference import swap_reference, weight_average_reference

# One group of a plan. The table's addresses tell what is written: lists of thousands of tensors
# would take longer to pass than to average. dtypes: of average, param and copy.
weight_average_update = Primitive(
    f"{OP}_update", "(Tensor table, Tensor weight, int[] dtypes, int chunks) -> ()", fake=None
)
weight_average_swap = Primitive(
    f"{OP}_swap", "(Tensor table, int[] dtypes, int chunks, bool back) -> ()", fake=None
)


def weight_average_(plan: Plan, weight: Tensor, *, backend: str | None = None) -> None:
    """``average += weight * (param - average)`` for every pair of a plan, in one launch.

    Args:
        plan: the tensors; one launch for each combination of their dtypes.
        weight: ``[]`` float32 on the device of the tensors, where it is read: 1 copies.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Numerics: float32 inside (float64 for float64 averages), rounded once; a compensated bfloat16
    average has 16 bits of fraction. A weight of 1 makes an average its param exactly.
    """
    if weight.numel() != 1 or weight.dtype != torch.float32:
        raise ValueError(
            f"{OP}: weight must be one float32, got {weight.dtype} of shape {list(weight.shape)}"
        )
    _checks.same_device(OP, "weight", weight, plan.device)
    name, groups = _choose(plan, backend), plan.groups()
    if name == "reference":
        with torch.no_grad():
            weight_average_reference(
                plan.averages, plan.params, plan.compensations, plan.copies, weight
            )
        return
    for group in groups:
        weight_average_update(name, group.table, weight.detach(), group.dtypes, group.chunks)


def weight_average_swap_(plan: Plan, *, back: bool = False, backend: str | None = None) -> None:
    """Exchanges the averages and params of a plan in place, with no memory beside them.

    The params become the averages, rounded to their dtype. Tensors of one dtype are exchanged as
    they are. A float32 average of a bfloat16 param keeps the lower half of its own bits, and the
    param in the upper half: with ``back`` both are again what they were, to the bit, provided that
    nobody wrote to either. Its rounding takes ties away from zero.

    Args:
        plan: of float32 averages with float32 or bfloat16 params, without compensations.
        back: undo.
        backend: as in :func:`weight_average_`.

    Raises:
        ValueError: a plan of other tensors.
    """
    if plan.compensations:
        raise ValueError(f"{OP}: averages must not be compensated to be exchanged")
    for i, (average, param) in enumerate(zip(plan.averages, plan.params, strict=True)):
        wide = average.dtype == torch.float32 and param.dtype == torch.bfloat16
        if average.dtype != param.dtype and not wide:
            raise ValueError(
                f"{OP}: params[{i}] must have the dtype of its average, or be bfloat16 with a "
                f"float32 one, to be exchanged, got {param.dtype} with {average.dtype}"
            )
    name, groups = _choose(plan, backend), plan.groups()
    with torch.no_grad():
        if name == "reference":
            swap_reference(plan.averages, plan.params, back)
        else:
            for group in groups:
                weight_average_swap(name, group.table, group.dtypes, group.chunks, back)
    for param in plan.params:
        # Whoever saved a weight for its backward pass must notice.
        torch.autograd.graph.increment_version(param)


def _choose(plan: Plan, backend: str | None) -> str:
    probe = torch.empty(0, dtype=torch.float64 if plan.wide else torch.float32)
    return _backend.choose(OP, plan.device.type, backend, unsupported, probe)
