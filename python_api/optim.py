"""AdamW that keeps the average of the weights in the same pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels._backend import check_name
from kdkernels.api import _averaged
from kdkernels.api._averaged import local
from kdkernels.api._spec import choice, integer, number, positive
from kdkernels.ops.adamw_average import Plan, adamw_average_
from kdkernels.ops.weight_average import Plan as AveragePlan
from kdkernels.ops.weight_average import weight_average_, weight_average_swap_

__all__ = ["AdamWAverage"]

NAME = "AdamWAverage"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)


class _Settings(NamedTuple):
    average: str | None
    decay: float
    warmup: bool
    start_step: int
    every: int
    count_start: bool
    master_weights: bool
    max_grad_norm: float | None
    backend: str | None


class _Part(NamedTuple):
    """A plan, and what it was made of."""

    made_of: list[Tensor]
    where: list[int]
    plan: Plan


class _Numbers(NamedTuple):
    """What all plans of a step share, on any device."""

    weight: Tensor | None
    factor: Tensor | None  # None: 1
    found_inf: Tensor | None


class AdamWAverage(torch.optim.Optimizer):
    r"""AdamW and the running average of the weights it makes, in one pass over memory.

    With ``t`` the steps of a parameter, this one included, and ``p`` its float32 master where there
    is one::

        g = gradient / grad_scale * min(1, max_grad_norm / (norm + 1e-6))
        p = p - lr * weight_decay * p
        m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        average = average + w * (p - average)

    It is :class:`torch.optim.AdamW` followed by ``swa_update_`` (``w = 1 / (n + 1)``) or
    ``ema_update_`` (``w = 1 - decay``), within rounding, for 36 bytes moved a float32 parameter
    instead of 40 and one launch for all tensors of a combination of dtypes. Buffers (statistics of
    batch norm) are not an optimizer's business: where a model has such, or has parameters that
    other optimizers train, use :class:`~kdkernels.WeightAverager`.

    Args:
        params: parameters or groups of them, float32, bfloat16, float16 or float64 (by the
            reference); a group may have its own ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``maximize``. Gradients are of a parameter's dtype or float32.
        lr: a number or a tensor of one element, which is read on its device.
        betas: of the moments, in [0, 1).
        eps: added to the root.
        weight_decay: decoupled, times ``lr``.
        maximize: go along the gradients.
        average: ``swa``, ``ema`` or ``None``.
        decay: of ``ema``, in [0, 1].
        warmup: ``ema`` with ``decay_t = min(decay, (1 + n) / (10 + n))`` after ``n`` models.
        start_step: steps before it (the first is 1) are not averaged, and move 8 bytes less.
        every: from then on each ``every``-th step is averaged.
        count_start: the weights before the first step count as one model (with ``start_step=0``;
            else the model at that step is the start).
        master_weights: 16-bit parameters are the rounding of float32 masters, kept here. Without
            them a bfloat16 parameter loses all updates below half of its last digit. What others
            write to such a parameter after its first step is lost.
        max_grad_norm: clip the norm of all gradients together; the last one is ``grad_norm``, a
            tensor. The gradients themselves are not written to.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Raises:
        TypeError: arguments of a wrong type; complex parameters.
        ValueError: values that do not fit.
        RuntimeError: sparse gradients; methods that must not be called inside of :meth:`swapped`.

    Note:
        Memory: float32 moments and average, 12 bytes a parameter, and 4 of a master. No step
        synchronises with the device; steps may be captured in a CUDA graph after one that made the
        state (with ``every=1``: the schedule is the host's; anew after :meth:`load_state_dict`).

        With a ``torch.amp.GradScaler`` call ``scaler.step(optimizer)`` as usual: the scale is
        divided out in the pass, gradients stay scaled and unclipped. A step whose gradients
        overflow writes nothing and is not counted as a model; the schedule goes on.

        Parameters without a gradient are left alone, and averaged as they are. Parameters sharded
        by ``fully_shard`` (FSDP2) are worked on by the part that is here; their state is sharded.
        The state of a :class:`torch.optim.AdamW` loads, with a fresh average.

    References:
        Loshchilov and Hutter, arXiv 1711.05101; Izmailov et al., arXiv 1803.05407; Lu et al., arXiv
        2212.05956. Numerics: ``kdkernels/ops/adamw_average/README.md``.

    Example:
        >>> import kdkernels, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = kdkernels.AdamWAverage(model.parameters(), lr=0.1, max_grad_norm=1.0)
        >>> for _ in range(3):
        ...     loss = model(torch.randn(3, 4)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.n_averaged
        tensor(3)
        >>> with optimizer.swapped():  # evaluates the mean of three models
        ...     loss = model(torch.randn(3, 4)).square().mean()
    """

    # A GradScaler then leaves scale and overflow to step().
    _step_supports_amp_scaling = True

    grad_norm: Tensor | None = None
    """The norm of the last step's gradients, unscaled, before clipping; with ``max_grad_norm``."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        average: str | None = "swa",
        decay: float = 0.999,
        warmup: bool = False,
        start_step: int = 0,
        every: int = 1,
        count_start: bool = False,
        master_weights: bool = False,
        max_grad_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        if average is not None:
            choice(NAME, "average", average, ("swa", "ema"))
        number(NAME, "decay", decay, 0.0, 1.0)
        integer(NAME, "start_step", start_step, 0)
        integer(NAME, "every", every, 1)
        for argument, value, kinds in (
            ("warmup", warmup, ("ema",)),
            ("count_start", count_start, ("swa", "ema")),
        ):
            if value and average not in kinds:
                raise ValueError(f"{NAME}: {argument} must be False for {average=}, got True")
        if max_grad_norm is not None:
            positive(NAME, "max_grad_norm", max_grad_norm)
        if backend is not None:
            check_name(NAME, backend)
        self._settings = _Settings(
            average, decay, warmup, start_step, every, count_start, master_weights, max_grad_norm,
            backend,
        )  # fmt: skip
        self._step, self._inside = 0, False
        self._count: Tensor | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of :class:`torch.optim.Optimizer`; what joins late starts its average as it is."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self._count is None:
            device = next((p.device for p in group["params"]), torch.device("cpu"))
            self._count = torch.tensor(self._first_count(), device=device)
        self._tell_groups()

    @property
    def n_averaged(self) -> Tensor:
        """How many models are in the average, ``[]`` int64 on the device; reading it waits."""
        assert self._count is not None
        return self._count.clone()

    @property
    def started(self) -> bool:
        """Whether there is an average yet; waits for the device."""
        return self._settings.average is not None and bool(self.n_averaged > 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW, and of the average where it is its turn.

        Args:
            closure: evaluates the model again and returns the loss, which is returned.
        """
        self._check_outside("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts, resting = self._found()
        found_inf = getattr(self, "found_inf", None)
        numbers = _Numbers(
            self._weight(), self._factor([p for _, ps in parts for p in ps]), found_inf
        )
        for i, (group, params) in enumerate(parts):
            self._update(i, group, params, numbers)
        if numbers.weight is not None and self._count is not None:
            if resting:
                self._average_resting(resting, numbers)
            one = 1 if found_inf is None else (found_inf == 0).reshape(()).to(self._count)
            self._count.add_(one)
        self._step += 1
        self._tell_groups()
        return loss

    def averages(self) -> list[Tensor]:
        """The averages in the order of the parameters, themselves and not copies.

        Of a parameter that never had a gradient, the parameter.
        """
        self._check_outside("averages")
        self._check_averaging("averages")
        return [self.state[p]["average"] if p in self.state else p.detach() for p in self._params()]

    @contextmanager
    def swapped(self, model: nn.Module | None = None) -> Iterator[None]:
        """The parameters are their averages in the block, and what they were after it.

        To the bit, and also when the block raises. float32 and bfloat16 parameters are exchanged
        with their averages, without memory for another copy (rounding to bfloat16 takes ties away
        from zero); float16 ones are kept in a copy meanwhile. The model's mode and its buffers are
        left alone: see :class:`~kdkernels.WeightAverager`.

        Args:
            model: needed where it is sharded by ``fully_shard``, which may hold whole parameters.

        Raises:
            RuntimeError: there is no average yet, or blocks are nested; at the end, parameters
                that were written to in the block: they are restored, their average is lost.
        """
        self._check_outside("swapped")
        self._check_averaging("swapped")
        if not self.started:
            raise RuntimeError(f"{NAME}: swapped must come after a step that averages, got none")
        shards = [] if model is None else _averaged.sharded(model)
        params = [p for p in self._params() if self.state.get(p)]
        for module in shards:
            module.reshard()
        plans, restore = self._swap_in(params)
        self._inside = True
        versions = [_averaged.version(p) for p in map(local, params)]
        try:
            yield
            written = [
                i
                for i, (p, version) in enumerate(zip(map(local, params), versions, strict=True))
                if _averaged.version(p) != version
            ]
        finally:
            for module in shards:
                module.reshard()
            self._swap_out(plans, restore)
        if written:
            raise RuntimeError(
                f"{NAME}: parameters must not be written to inside of swapped, got a change of one "
                f"of shape {list(params[written[0]].shape)}: it is restored, its average is lost"
            )

    def state_dict(self) -> dict[str, Any]:
        """As of :class:`torch.optim.Optimizer`; groups also hold how far the average is.

        It loads with ``torch.load(weights_only=True)`` and ``torch.distributed.checkpoint``.
        """
        self._check_outside("state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a :meth:`state_dict`, or that of a :class:`torch.optim.AdamW`.

        Training goes on to the bit as if never interrupted; the schedule and the kind of average
        are those of this optimizer. Tensors are copied, and keep their dtype (torch's own method
        rounds them to that of their parameter). Load the model first: averages and masters that
        the state lacks start from it.

        Raises:
            ValueError: shapes that do not fit; ``amsgrad``. Nothing is changed then.
        """
        self._check_outside("load_state_dict")
        seen: list[dict[str, Any]] = []
        before = {p: dict(state) for p, state in self.state.items()}

        def see(_: Any, state: dict[str, Any]) -> None:  # after the hooks of others
            self._check_state(state)
            seen.append(state)

        def restore(_: Any) -> None:
            self._restore(seen[0], before)

        hooks = [
            self.register_load_state_dict_pre_hook(see),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        own = {key: self.__dict__[key] for key in ("_settings", "_step", "_inside", "_count")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See ``__getstate__``; also called by ``load_state_dict``."""
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        self._parts: dict[int, _Part] = {}
        self._scalars: dict[tuple[str, int, torch.device], tuple[float, Tensor]] = {}

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _first_count(self) -> int:
        return int(self._settings.count_start and self._settings.start_step == 0)

    def _tell_groups(self) -> None:
        # What else is in a state dict is lost by torch.distributed.checkpoint.
        for group in self.param_groups:
            group["averaging_step"], group["n_averaged"] = self._step, self._count

    def _found(self) -> tuple[list[tuple[dict[str, Any], list[Tensor]]], list[Tensor]]:
        """Groups with parameters of a device and dtype to update; parameters only to average."""
        parts, resting = [], []
        for group in self.param_groups:
            found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    if self.state.get(p):
                        resting.append(p)
                    continue
                if p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{NAME}: gradients must be dense, got {p.grad.layout} for a parameter of "
                        f"shape {list(p.shape)}"
                    )
                if not self.state[p]:
                    self.state[p] = self._fresh(p)
                found.setdefault((p.device, p.dtype), []).append(p)
            parts += [(group, params) for params in found.values()]
        return parts, resting

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        dtype = _state_dtype(p)
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(p, dtype=dtype),
        }
        # All models so far had it as it is.
        return {**state, **{name: self._copied(p) for name in self._copies(p)}}

    def _copies(self, p: Tensor) -> list[str]:
        """The state that starts as the parameter."""
        names = ["average"] if self._settings.average is not None else []
        return names + ["master"] * (self._settings.master_weights and p.dtype in HALVES)

    def _copied(self, p: Tensor) -> Tensor:
        return p.detach().to(_state_dtype(p), copy=True)

    def _weight(self) -> Tensor | None:
        """Of this step's model; ``None`` where it is not averaged."""
        s, step = self._settings, self._step + 1
        if s.average is None or step < s.start_step or (step - s.start_step) % s.every:
            return None
        assert self._count is not None
        return _averaged.weight(s.average, self._count, s.decay, s.warmup)

    def _factor(self, params: list[Tensor]) -> Tensor | None:
        """Of all gradients; ``None``: 1."""
        scale, most = getattr(self, "grad_scale", None), self._settings.max_grad_norm
        factor = None if scale is None else scale.reshape(()).float().reciprocal()
        if most is None or not params:
            return factor
        norm = _total_norm([p.grad for p in params if p.grad is not None])
        if factor is not None:
            norm = norm * factor.to(norm.device)
        self.grad_norm = norm
        clip = (most / (norm + 1e-6)).clamp(max=1.0).float()
        return clip if factor is None else factor.to(clip.device) * clip

    def _update(
        self, place: int, group: dict[str, Any], params: list[Tensor], numbers: _Numbers
    ) -> None:
        plan, device = self._plan(place, params), params[0].device
        grads = [_local_grad(p) for p in params]
        adamw_average_(
            plan,
            grads,
            lr=self._scalar("lr", place, group["lr"], device),
            factor=self._scalar(
                "factor", 0, 1.0 if numbers.factor is None else numbers.factor, device
            ),
            weight=None if numbers.weight is None else _there(numbers.weight, device),
            found_inf=None if numbers.found_inf is None else _there(numbers.found_inf, device),
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            backend=self._settings.backend,
        )

    def _plan(self, place: int, params: list[Tensor]) -> Plan:
        """That of the last step, unless it was of other tensors."""
        states = [self.state[p] for p in params]
        names = ["exp_avg", "exp_avg_sq", "step", *self._copies(params[0])]
        columns = [params, *([state[name] for state in states] for name in names)]
        made_of = [x for xs in columns for x in xs]
        where = [local(p).data_ptr() for p in params]
        kept = self._parts.get(place)
        same = kept is not None and kept.where == where and len(kept.made_of) == len(made_of)
        if kept is not None and same and all(map(_is_same, kept.made_of, made_of)):
            return kept.plan
        columns = [[local(x) for x in xs] for xs in columns]
        found = dict(zip(names, columns[1:], strict=True))
        plan = Plan(
            *columns[:4],
            averages=found.get("average", ()),
            masters=found.get("master", ()),
        )
        self._parts[place] = _Part(made_of, where, plan)
        return plan

    def _scalar(self, name: str, place: int, value: float | Tensor, device: torch.device) -> Tensor:
        """A number on a device; not made again while it stays the same."""
        if isinstance(value, Tensor):
            return _there(value, device)
        key = name, place, device
        if key not in self._scalars:
            self._scalars[key] = value, torch.full((), value, dtype=torch.float32, device=device)
        elif self._scalars[key][0] != value:  # in place: a graph may hold its address
            self._scalars[key] = value, self._scalars[key][1].fill_(value)
        return self._scalars[key][1]

    def _average_resting(self, params: list[Tensor], numbers: _Numbers) -> None:
        """Of parameters that this step leaves alone."""
        assert numbers.weight is not None
        for device in {p.device: None for p in params}:
            here = [p for p in params if p.device == device]
            weight = _there(numbers.weight, device)
            if numbers.found_inf is not None:
                weight = torch.where(_there(numbers.found_inf, device) == 0, weight, 0.0)
            averages = [local(self.state[p]["average"]) for p in here]
            sources = [local(self.state[p].get("master", p)).detach() for p in here]
            plan = AveragePlan(averages, sources)
            weight_average_(plan, weight, backend=self._settings.backend)

    @torch.no_grad()
    def _swap_in(
        self, params: list[Tensor]
    ) -> tuple[list[AveragePlan], list[tuple[Tensor, Tensor]]]:
        """Returns what is exchanged, and what is not with what it was before."""
        pairs = [(local(self.state[p]["average"]), local(p).detach()) for p in params]
        # All memory is taken before the first weight changes.
        copied = [(x, average) for average, x in pairs if x.dtype == torch.float16]
        restore = [(x, x.clone()) for x, _ in copied]
        plans = []
        for device in {x.device: None for _, x in pairs}:
            here = [(a, x) for a, x in pairs if x.device == device and x.dtype != torch.float16]
            plans.append(AveragePlan([a for a, _ in here], [x for _, x in here]))
        for x, average in copied:
            x.copy_(average)
        for plan in plans:
            weight_average_swap_(plan, backend=self._settings.backend)
        torch.clear_autocast_cache()  # holds weights in another dtype
        return plans, restore

    @torch.no_grad()
    def _swap_out(self, plans: list[AveragePlan], restore: list[tuple[Tensor, Tensor]]) -> None:
        torch.clear_autocast_cache()
        for plan in plans:
            weight_average_swap_(plan, back=True, backend=self._settings.backend)
        for x, before in restore:
            x.copy_(before)
        self._inside = False

    def _check_state(self, given: Mapping[str, Any]) -> None:
        """Before anything is changed."""
        for group in given["param_groups"]:
            if group.get("amsgrad"):
                raise ValueError(f"{NAME}: amsgrad of the state must be False, got True")
        for p, state in self._given_states(given):
            for name in ("step", "exp_avg", "exp_avg_sq"):
                if name not in state:
                    raise ValueError(f"{NAME}: state must have {name} of each parameter, got none")
            for name in ("exp_avg", "exp_avg_sq", "average", "master"):
                x = state.get(name)
                if isinstance(x, Tensor) and x.shape != p.shape:
                    raise ValueError(
                        f"{NAME}: {name} of the state must have the shape of its parameter "
                        f"{list(p.shape)}, got {list(x.shape)}"
                    )

    def _given_states(self, given: Mapping[str, Any]) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
        names = chain.from_iterable(group["params"] for group in given["param_groups"])
        for name, p in zip(names, self._params(), strict=False):  # torch checks their number
            if state := given["state"].get(name):
                yield p, state

    @torch.no_grad()
    def _restore(self, given: Mapping[str, Any], before: Mapping[Tensor, dict[str, Any]]) -> None:
        for p, state in self._given_states(given):
            own, loaded = before.get(p, {}), {}
            step = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
            loaded["step"] = step if step is own.get("step") else step.clone().reshape(())
            for name in ("exp_avg", "exp_avg_sq", *self._copies(p)):
                x = state.get(name)
                if x is None:
                    loaded[name] = self._copied(p)
                elif x is own.get(name):  # loaded in place
                    loaded[name] = x
                else:
                    loaded[name] = torch.empty_like(p, dtype=_state_dtype(p)).copy_(x)
            self.state[p] = loaded
        group = self.param_groups[0]
        self._step = int(group.get("averaging_step", 0))
        assert self._count is not None
        self._count.copy_(torch.as_tensor(group.get("n_averaged", self._first_count())))
        self._tell_groups()

    def _check_outside(self, what: str) -> None:
        if self._inside:
            raise RuntimeError(
                f"{NAME}: {what} must be called outside of swapped, got a call inside"
            )

    def _check_averaging(self, what: str) -> None:
        if self._settings.average is None:
            raise RuntimeError(
                f"{NAME}: {what} must be called of an optimizer that averages, got average=None"
            )


def _check_group(group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{NAME}: lr must be one number, got shape {list(lr.shape)}")
    else:
        number(NAME, "lr", lr, 0.0, math.inf)
    if len(group["betas"]) != 2:
        raise ValueError(f"{NAME}: betas must be two numbers, got {len(group['betas'])}")
    for beta in group["betas"]:
        number(NAME, "betas", beta, 0.0, 1.0)
        if beta == 1.0:
            raise ValueError(f"{NAME}: betas must be below 1, got {beta!r}")
    number(NAME, "eps", group["eps"], 0.0, math.inf)
    number(NAME, "weight_decay", group["weight_decay"], 0.0, math.inf)
    for i, p in enumerate(group["params"]):
        if p.is_complex():
            raise TypeError(f"{NAME}: params must be real, got {p.dtype} at place {i}")
        if p.dtype not in DTYPES:
            raise TypeError(
                f"{NAME}: params must be float32, bfloat16, float16 or float64, got {p.dtype} at "
                f"place {i}"
            )


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _is_same(a: object, b: object) -> bool:
    return a is b


def _there(x: Tensor, device: torch.device) -> Tensor:
    return x.detach().to(device, torch.float32, non_blocking=True).reshape(())


def _local_grad(p: Tensor) -> Tensor:
    grad = p.grad
    assert grad is not None
    if _averaged.is_sharded(p) and grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local(grad)


def _total_norm(grads: Sequence[Tensor]) -> Tensor:
    """``[]`` float32 or wider: norms of 16-bit gradients in their dtype have three digits."""
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        mesh = grad.device_mesh if _averaged.is_sharded(grad) else None  # type: ignore[attr-defined]
        groups.setdefault((grad.device, grad.dtype, mesh), []).append(grad)
    parts = []
    for (_, dtype, mesh), xs in groups.items():
        if mesh is not None:
            # The whole tensors' norms, by the collectives of their sharding.
            whole = torch.nn.utils.get_total_norm([x.float() for x in xs])
            parts.append(whole.full_tensor())  # type: ignore[attr-defined]
            continue
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch._foreach_norm(xs, 2.0, dtype=wide)
        parts.append(torch.linalg.vector_norm(torch.stack(norms)))
    device = parts[0].device
    return torch.linalg.vector_norm(torch.stack([x.to(device, non_blocking=True) for x in parts]))
