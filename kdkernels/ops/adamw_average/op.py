"""The contract of ``adamw_average``: a step of AdamW and of the weights' average, in place.

Layers above (``kdkernels.api``) bring schedules, parameter groups and clipping; here everything is
a :class:`~kdkernels.ops.adamw_average.plan.Plan`, the gradients of this step, and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import _backend, _checks
from kdkernels._op import Primitive
from kdkernels.ops._shared.multi_tensor import unsupported
from kdkernels.ops.adamw_average.plan import OP, Group, Plan
from kdkernels.ops.adamw_average.reference import Constants, adamw_average_reference

# One group of a plan. constants: those of reference.py; dtypes: of param, gradient, average and
# master, -1 where there is none (or the average is left alone in this step).
adamw_average_update = Primitive(
    f"{OP}_update",
    "(Tensor table, Tensor weight, Tensor lr, Tensor factor, Tensor? found_inf, "
    "float[] constants, int[] dtypes, int chunks) -> ()",
    fake=None,
)
# Gradients lie elsewhere at each step: their column of the table.
adamw_average_grads = Primitive(
    f"{OP}_grads", "(Tensor(a!) table, int[] addresses) -> ()", fake=None
)


def adamw_average_(
    plan: Plan,
    grads: Sequence[Tensor],
    *,
    lr: Tensor,
    factor: Tensor,
    weight: Tensor | None = None,
    found_inf: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """A step of AdamW and ``average += weight * (param - average)``, in one pass over memory.

    With ``t`` the tensor's steps, this one included::

        g = factor * grad                                     (negated by maximize)
        p -= lr * weight_decay * p                            (p: the master, else the param)
        m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
        p -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    and the average is that of the masters, or of the params as they were rounded.

    Args:
        plan: the tensors; one launch for each combination of their dtypes.
        grads: of its params; of their dtype or float32, their shapes and strides.
        lr: ``[]`` float32 on the device of the tensors, as the next three.
        factor: of the gradients: ``1 / scale`` of a GradScaler, clipping.
        weight: of the average, 1 copies; ``None`` leaves averages alone, with their traffic.
        found_inf: where it is not 0 nothing is written and no step counted.
        betas: in [0, 1).
        eps: added to the root.
        weight_decay: decoupled, times ``lr``.
        maximize: go along the gradients.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Raises:
        ValueError: gradients that do not fit, numbers of other dtypes.

    Numerics: float32 inside (float64 for float64 params), params rounded once.
    """
    scalars = {"lr": lr, "factor": factor, "weight": weight, "found_inf": found_inf}
    for name, x in scalars.items():
        if x is None:
            continue
        if x.numel() != 1 or x.dtype != torch.float32:
            raise ValueError(
                f"{OP}: {name} must be one float32, got {x.dtype} of shape {list(x.shape)}"
            )
        _checks.same_device(OP, name, x, plan.device)
    if weight is not None and not plan.averages and plan.params:
        raise ValueError(f"{OP}: weight must be None for a plan without averages, got a tensor")
    constants = Constants(*betas, eps, weight_decay, maximize)
    name, groups = _choose(plan, backend), plan.groups(grads)
    with torch.no_grad():
        _count_step(plan, found_inf)
        if name == "reference":
            adamw_average_reference(
                plan.params,
                grads,
                plan.exp_avgs,
                plan.exp_avg_sqs,
                plan.steps,
                plan.averages if weight is not None else [],
                plan.masters,
                factor if weight is None else weight,
                lr,
                factor,
                found_inf,
                constants,
            )
            return
    for group in groups:
        _find_grads(name, group, grads)
        dtypes = (
            *group.dtypes,
            0 if weight is not None else -1,
            0 if plan.masters else -1,
        )
        # There must be a weight, which is not read.
        numbers = [float(c) for c in constants]
        adamw_average_update(
            name,
            group.table,
            (factor if weight is None else weight).detach(),
            lr.detach(),
            factor.detach(),
            found_inf,
            numbers,
            dtypes,
            group.chunks,
        )
    for param in plan.params:
        # Whoever saved a weight for its backward pass must notice.
        torch.autograd.graph.increment_version(param)


def _choose(plan: Plan, backend: str | None) -> str:
    probe = torch.empty(0, dtype=torch.float64 if plan.wide else torch.float32)
    return _backend.choose(OP, plan.device.type, backend, unsupported, probe)


def _count_step(plan: Plan, found_inf: Tensor | None) -> None:
    if not plan.steps:
        return
    if found_inf is not None:
        advance = (found_inf == 0).float().reshape(())
    elif plan.device.type == "cpu":
        # A number would become a tensor once for each step counter.
        advance = torch.tensor(1.0)
    else:
        torch._foreach_add_(plan.steps, 1.0)
        return
    torch._foreach_add_(plan.steps, advance)


def _find_grads(backend: str, group: Group, grads: Sequence[Tensor]) -> None:
    """Brings the column of the gradients' addresses up to date."""
    addresses = [grads[i].data_ptr() for i in group.places]
    # A graph that is captured must bring its own, and leaves behind what the host cannot know.
    captured = group.table.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or addresses != group.addresses:
        adamw_average_grads(backend, group.table, addresses)
        group.addresses = [] if captured else addresses
