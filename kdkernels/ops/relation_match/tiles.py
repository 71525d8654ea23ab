"""What ``relation_match`` runs: tile after tile of the scores, GEMMs and the kernel of their rows.

The scores of both models exist for one tile at a time (some heads, some queries, all keys), in
float32, are compared row by row, and their gradient feeds the GEMMs of the backward pass at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels._op import Primitive
from kdkernels.ops._shared.chunks import kept
from kdkernels.ops.hidden_match.op import hidden_match_forward, hidden_match_grad
from kdkernels.ops.hidden_match.spec import Spec as MatchSpec
from kdkernels.ops.kd_loss.op import kd_loss_forward, kd_loss_grad_
from kdkernels.ops.kd_loss.spec import Divergence
from kdkernels.ops.kd_loss.spec import Spec as RowSpec
from kdkernels.ops.relation_match.spec import Kind, Spec

# Bytes of both models' scores in a tile, of each thread. CPU, shared cores, ms: 8 x 12 heads, 512
# tokens, width 64: 0.5 MB 650, 1 MB 633, 2 MB 663, 4 MB 668, 8 MB 699 (the GEMMs alone 695, eager
# 2284); 2 x 16 heads: 203, 203, 164, 152, 184 (212, 732). Not measured on a GPU.
_TILE_BYTES = {"cpu": 2 << 20}
_TILE_BYTES_ELSEWHERE = 256 << 20
# On a CPU: so many, that threads which begin late leave little to wait for.
_HEADS_A_THREAD = 4
# Causal queries of a tile at most: it has the keys up to its last query, so short tiles save work.
_CAUSAL_ROWS = 128
_IGNORED = -100


# Scores of padding for which it pays, on the CPU, to work on an example by itself. MiniLM's three
# relations, 12 heads, ms without and with: 32 x 24 tokens (some 3,000 saved an example) 17 and 26,
# 32 x 48 (14,000) 23 and 26, 16 x 128 (45,000) 70 and 49, 8 x 512 (1.5 million) 409 and 185.
_SCORES_SAVED = 15_000


class _Group(NamedTuple):
    """Examples that are worked on together, and their tokens (``None``: all)."""

    examples: slice
    tokens: Tensor | None


class _Rows(NamedTuple):
    """What the rows' kernels take beside the scores, for a group: ``[heads, queries]``."""

    valid: Tensor | None  # bool
    weights: Tensor | None
    keys: Tensor | None  # how many a query sees, where that is not all of a tile's
    blocked: Tensor | None  # [heads, 1, keys] bool


class Call:
    """A call, resolved: groups of examples, heads, numbers."""

    def __init__(
        self,
        student_q: Tensor,
        student_k: Tensor | None,
        teacher_q: Tensor,
        teacher_k: Tensor | None,
        mask: Tensor | None,
        row_weights: Tensor | None,
        denominator: Tensor | None,
        head_map: Sequence[int],
        numbers: Any,
        tile_bytes: int,
        *,
        backend: str,
    ) -> None:
        self.spec = Spec.of(numbers)
        self.student, self.teacher = (student_q, student_k), (teacher_q, teacher_k)
        self.batch, self.heads, self.seq, _ = student_q.shape
        self.head_map = list(head_map) or list(range(self.heads))
        self.mask, self.row_weights = mask, row_weights
        # Other backends run on CPU tensors to show what they do on a GPU.
        self.by_heads = student_q.device.type == "cpu" and backend == "native"
        self.packed = self.by_heads
        if self.packed and mask is not None:
            self.packed = _worth_packing(mask, self.heads)
        usual = _TILE_BYTES.get(student_q.device.type, _TILE_BYTES_ELSEWHERE)
        self.tile_bytes = tile_bytes or usual
        self.denominator = denominator
        if denominator is None and self.spec.mean:
            count = student_q.new_full((), self.batch * self.seq, dtype=torch.float32)
            self.denominator = (count if mask is None else mask.sum().float()) * self.heads
        self._memory = student_q.new_empty((0,), dtype=torch.float32)

    def memory(self, elements: int) -> tuple[Tensor, Tensor]:
        """For the scores of a tile, of both models; always the same."""
        if self._memory.numel() < 2 * elements:
            self._memory = self._memory.new_empty((2 * elements,))
        return self._memory[:elements], self._memory[elements:]

    def groups(self) -> Iterator[_Group]:
        """Packed: without the tokens that do not count, example by example."""
        at_once = max(1, self.tile_bytes // max(8 * self.heads * self.seq * self.seq, 1))
        if self.by_heads:
            # Each thread has a tile of its own, whatever the number of heads of a loop.
            wanted = _HEADS_A_THREAD * torch.get_num_threads()
            at_once = max(at_once, -(-wanted // self.heads))
        counts = [self.seq] * self.batch
        if self.mask is not None and self.packed:
            counts = self.mask.sum(1).tolist()
        begin = 0
        while begin < self.batch and self.seq > 0:
            end = begin + 1
            if counts[begin] == self.seq:
                while end < min(begin + at_once, self.batch) and counts[end] == self.seq:
                    end += 1
                yield _Group(slice(begin, end), None)
            elif counts[begin] > 0:
                assert self.mask is not None
                yield _Group(slice(begin, end), self.mask[begin].nonzero().squeeze(1))
            begin = end

    def models(self, group: _Group) -> tuple[Tensor, ...]:
        """Queries and keys of student and teacher, ``[heads, tokens, width]`` each."""
        found = []
        clean = None
        if self.mask is not None and not self.packed:
            clean = ~self.mask[group.examples, None, :, None]
        for (q, k), heads, cleaned in (
            # The student's meet the gradient's zeros in a GEMM: they must be finite.
            (self.student, list(range(self.heads)), clean),
            (self.teacher, self.head_map, None),
        ):
            queries = _of_heads(q, group, heads, cleaned)
            found.append(queries)
            if k is None:
                found.append(queries)
            else:
                shared = q.shape[1] // k.shape[1]
                found.append(_of_heads(k, group, [head // shared for head in heads], cleaned))
        return tuple(found)

    def rows(self, group: _Group) -> _Rows:
        """What the rows' kernels take beside the scores."""

        def of(x: Tensor) -> Tensor:  # [batch, 1 or heads, seq] -> [heads of the group, tokens]
            x = x[group.examples].expand(-1, self.heads, -1)
            x = x if group.tokens is None else x.index_select(2, group.tokens)
            return x.reshape(-1, x.shape[2])

        weights = None if self.row_weights is None else of(self.row_weights)
        causal, mse = self.spec.causal, self.spec.kind == Kind.MSE.value
        if self.mask is None or self.packed:
            keys = None
            if causal and mse:
                tokens = self.seq if group.tokens is None else group.tokens.numel()
                device = self.student[0].device
                keys = torch.arange(1, tokens + 1, device=device, dtype=torch.float32)
                examples = group.examples.stop - group.examples.start
                keys = keys.expand(examples * self.heads, -1)
            return _Rows(None, weights, keys, None)
        mask = self.mask[:, None]
        counts = mask.cumsum(2) if causal else mask.sum(2, keepdim=True).expand(-1, -1, self.seq)
        keys = of(counts.clamp(min=1).float()) if mse else None
        valid = of(mask)
        return _Rows(valid, weights, keys, ~valid[:, None])

    def tiles(self, heads: int, tokens: int) -> Iterator[tuple[slice, slice, int]]:
        """Heads, queries, and the number of keys that these see."""
        a_row = 8 * tokens
        most = max(1, min(tokens, self.tile_bytes // a_row))
        if self.spec.causal:
            most = min(most, _CAUSAL_ROWS)
        step = -(-tokens // -(-tokens // most))
        together = max(1, min(heads, self.tile_bytes // (step * a_row)))
        for head in range(0, heads, together):
            for row in range(0, tokens, step):
                end = min(row + step, tokens)
                keys = end if self.spec.causal else tokens
                yield slice(head, min(head + together, heads)), slice(row, end), keys

    def put(self, out: Tensor, group: _Group, values: Tensor) -> None:
        """Writes ``[heads of the group, tokens, ...]`` to where the group's examples are.

        Where ``out`` has fewer heads, those that share one are added up.
        """
        target = out[group.examples]
        examples, heads = target.shape[:2]
        values = values.view(examples, heads, -1, *values.shape[1:])
        values = values.sum(2) if values.shape[2] > 1 else values[:, :, 0]
        if group.tokens is None:
            target.copy_(values)
        else:
            target.index_copy_(2, group.tokens, values.to(target.dtype))


def _worth_packing(mask: Tensor, heads: int) -> bool:
    """Whether examples with padding are long enough to leave it out; looking costs no
    synchronisation on the CPU.
    """
    seq = mask.shape[1]
    padded = [count for count in mask.sum(1).tolist() if count < seq]
    return heads * sum(seq**2 - count**2 for count in padded) >= _SCORES_SAVED * len(padded)


def _of_heads(x: Tensor, group: _Group, heads: list[int], cleaned: Tensor | None) -> Tensor:
    """``[heads of the group, tokens, width]`` as the GEMMs take it."""
    x = x[group.examples]
    if group.tokens is not None:
        x = x.index_select(2, group.tokens)
    # float32, but for bfloat16 on a GPU, whose GEMMs keep float32 results. float16 could not hold
    # the gradient of scores, which is divided by the number of rows.
    if not (x.is_cuda and x.dtype == torch.bfloat16):
        x = x.float()
    if cleaned is not None:
        x = x.masked_fill(cleaned, 0.0)
    if heads != list(range(x.shape[1])):
        # Views put together: an index of heads would have to be copied to the device.
        x = torch.cat([x[:, head : head + 1] for head in heads], 1)
    return x.reshape(-1, *x.shape[2:])


# ---- GEMMs ---------------------------------------------------------------------------------------
# In place, or into a given tensor: autocast would round what is returned.


def _scores(out: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``scale * q @ k.T`` in float32, in the memory of ``out``."""
    shape = (q.shape[0], q.shape[1], k.shape[1])
    out = out[: shape[0] * shape[1] * shape[2]].view(shape)
    if q.dtype == torch.float32:
        return torch.baddbmm(out, q, k.transpose(1, 2), beta=0, alpha=scale, out=out)
    torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32, out=out)
    return out if scale == 1.0 else out.mul_(scale)


def _add(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``out += scale * a @ b``."""
    if b.dtype == torch.float32:
        out.baddbmm_(a, b, alpha=scale)
    else:
        out.add_(torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32), alpha=scale)


# ---- rows ----------------------------------------------------------------------------------------


class _Kernel:
    """The kernel that compares rows of scores, of a backend and a kind."""

    def __init__(self, call: Call, backend: str) -> None:
        spec = call.spec
        self.kl = spec.kind == Kind.KL.value
        self._backend, self._denominator = backend, call.denominator
        self._causal = spec.causal
        # The kernel of the KL has factors of its own, the GEMMs scale for the other.
        scales = spec.student_scale, spec.teacher_scale
        self.scales = (1.0, 1.0) if self.kl else scales
        self.row_spec = RowSpec(
            Divergence.FORWARD_KL.value,
            kd_weight=1.0,
            student_scale=scales[0],
            teacher_scale=scales[1],
            ignore_index=_IGNORED,
            mean=False,
        )

    def block(self, scores: Sequence[Tensor], rows: _Rows, heads: slice, queries: slice) -> None:
        """Leaves out the keys that a query does not see."""
        fill = -torch.inf if self.kl else 0.0
        keys = scores[0].shape[2]
        if rows.blocked is not None:
            for x in scores:
                x.masked_fill_(rows.blocked[heads, :, :keys], fill)
        if self._causal:
            size = keys - queries.start  # before them every query sees all
            ahead = torch.ones((size, size), dtype=torch.bool, device=scores[0].device).triu_(1)
            for x in scores:
                x[:, :, queries.start :].masked_fill_(ahead, fill)

    def _others(
        self, s: Tensor, rows: _Rows, heads: slice, queries: slice
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which rows count, and their weights."""
        valid = None if rows.valid is None else rows.valid[heads, queries].reshape(-1)
        weights = None if rows.weights is None else rows.weights[heads, queries]
        if rows.keys is not None:  # the kernel takes the mean over all of a row
            share = s.shape[2] / rows.keys[heads, queries]
            weights = share if weights is None else share * weights
        if self.kl and valid is not None:
            valid = torch.where(valid, 0, _IGNORED)
        # An upstream gradient may be one number, expanded.
        weights = None if weights is None else weights.reshape(-1).contiguous()
        return None if valid is None else valid.contiguous(), weights

    def forward(
        self, s: Tensor, t: Tensor, rows: _Rows, heads: slice, queries: slice
    ) -> tuple[Tensor, Tensor]:
        """The loss of a tile, and its rows."""
        flat = s.view(-1, s.shape[2]), t.view(-1, s.shape[2])
        valid, weights = self._others(s, rows, heads, queries)
        if self.kl:
            loss, _, found = kd_loss_forward(
                self._backend, *flat, valid, weights, self._denominator, self.row_spec
            )
        else:
            loss, _, found = hidden_match_forward(
                self._backend, [flat[0]], [flat[1]], valid, weights, self._denominator, [1.0],
                MatchSpec(),
            )  # fmt: skip
        return loss, found.view(s.shape[:2])

    def gradient(
        self, s: Tensor, t: Tensor, rows: _Rows, heads: slice, queries: slice
    ) -> tuple[Tensor, Tensor]:
        """The loss of a tile, and its gradient for the student's scores, which may overwrite
        them.
        """
        flat = s.view(-1, s.shape[2]), t.view(-1, s.shape[2])
        valid, weights = self._others(s, rows, heads, queries)
        if self.kl:
            loss, _ = kd_loss_grad_(
                self._backend, *flat, valid, weights, self._denominator, self.row_spec
            )
            return loss, s
        loss, _, found = hidden_match_grad(
            self._backend, [flat[0]], [flat[1]], valid, weights, self._denominator, [1.0],
            MatchSpec(),
        )  # fmt: skip
        return loss, found[: s.numel()].view(s.shape)


class _Tile(NamedTuple):
    heads: slice
    queries: slice
    keys: int
    student: Tensor  # scores [heads, queries, keys]
    teacher: Tensor


# ---- heads, on the CPU ---------------------------------------------------------------------------

# One parallel loop over the heads of a group, each worked on by one thread from its scores to its
# gradients: loss, and what is added to the gradients or written to the rows. numbers: whether kl,
# whether causal, scales of both models' products, scale of the gradient's, bytes of a tile.
_heads_loss = Primitive(
    "relation_match_heads",
    "(Tensor q, Tensor k, Tensor teacher_q, Tensor teacher_k, Tensor? labels, Tensor? weights, "
    "Tensor? keys, Tensor? blocked, Tensor? denominator, Tensor(a!)? grad_q, Tensor(b!)? grad_k, "
    "Tensor(c!)? rows, float[] numbers, float[] row_spec) -> Tensor",
    fake=lambda q, *args: q.new_empty((), dtype=torch.float64),
)


def _by_heads(
    call: Call,
    kernel: _Kernel,
    models: tuple[Tensor, ...],
    rows: _Rows,
    grads: tuple[Tensor | None, Tensor | None],
    found: Tensor | None,
) -> Tensor:
    """Loss of a group."""
    heads, tokens = models[0].shape[:2]

    def whole(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(heads, tokens).contiguous()

    labels = None if rows.valid is None else torch.where(rows.valid, 0, _IGNORED)
    blocked = None if rows.blocked is None else whole(rows.blocked[:, 0])
    numbers = [
        float(kernel.kl), float(call.spec.causal), *kernel.scales, kernel.scales[0],
        float(call.tile_bytes),
    ]  # fmt: skip
    loss: Tensor = _heads_loss(
        "native", *(x.contiguous() for x in models), whole(labels), whole(rows.weights),
        whole(rows.keys), blocked, call.denominator, *grads, found, numbers,
        kernel.row_spec if kernel.kl else MatchSpec(),
    )  # fmt: skip
    return loss


def _walk(
    call: Call, kernel: _Kernel, group: _Group, models: tuple[Tensor, ...], rows: _Rows
) -> Iterator[_Tile]:
    """The scores of a group, tile by tile."""
    q, k, teacher_q, teacher_k = models
    tiles = [] if call.by_heads else list(call.tiles(*q.shape[:2]))
    if not tiles:
        return
    most = max((h.stop - h.start) * (r.stop - r.start) * keys for h, r, keys in tiles)
    memory = call.memory(most)
    for heads, queries, keys in tiles:
        s = _scores(memory[0], q[heads, queries], k[heads, :keys], kernel.scales[0])
        t = _scores(memory[1], teacher_q[heads, queries], teacher_k[heads, :keys], kernel.scales[1])
        kernel.block((s, t), rows, heads, queries)
        yield _Tile(heads, queries, keys, s, t)


def forward(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and rows."""
    kernel, q = _Kernel(call, backend), call.student[0]
    loss = q.new_zeros((), dtype=torch.float64)
    out = q.new_zeros(q.shape[:3], dtype=torch.float32)
    for group in call.groups():
        models, rows = call.models(group), call.rows(group)
        found = q.new_zeros(models[0].shape[:2], dtype=torch.float32)
        if call.by_heads:
            loss += _by_heads(call, kernel, models, rows, (None, None), found)
            call.put(out, group, found)
            continue
        for tile in _walk(call, kernel, group, models, rows):
            tile_loss, tile_rows = kernel.forward(
                tile.student, tile.teacher, rows, tile.heads, tile.queries
            )
            loss += tile_loss
            found[tile.heads, tile.queries] = tile_rows
        call.put(out, group, found)
    return loss.float(), out


def gradients(call: Call, backend: str, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the wanted gradients; that of the queries has the keys' too where they are one."""
    kernel, (q, k) = _Kernel(call, backend), call.student
    back = kernel.scales[0]
    loss = q.new_zeros((), dtype=torch.float64)
    wanted = wanted[0], wanted[1] and k is not None
    out = [
        empty_gradient(q if x is None else x, want) for x, want in zip((q, k), wanted, strict=True)
    ]
    for group in call.groups():
        models, rows = call.models(group), call.rows(group)
        # Of keys that heads share, one for each of these heads.
        sums = [x.new_zeros(x.shape, dtype=torch.float32) if want else None
                for x, want in zip(models, wanted, strict=False)]  # fmt: skip
        of_q, of_k = (sums[0], sums[0]) if k is None else sums
        if call.by_heads:
            loss += _by_heads(call, kernel, models, rows, (of_q, of_k), None)
        for heads, queries, keys, s, t in _walk(call, kernel, group, models, rows):
            tile_loss, grad = kernel.gradient(s, t, rows, heads, queries)
            loss += tile_loss
            if of_q is not None:
                _add(of_q[heads, queries], grad, models[1][heads, :keys], back)
            if of_k is not None:
                _add(of_k[heads, :keys], grad.transpose(1, 2), models[0][heads, queries], back)
        for target, found in zip(out, sums, strict=True):
            if found is not None:
                call.put(target, group, found)
    return loss.float(), out[0], out[1]


def empty_gradient(x: Tensor, wanted: bool) -> Tensor:
    """Zeros in the layout of ``x``, in the dtype in which a gradient waits for its factor."""
    return torch.zeros_like(x, dtype=kept(x.dtype)) if wanted else x.new_zeros((0,))


Launcher = Callable[..., Any]


def launchers(backend: str) -> tuple[Launcher, Launcher]:
    """What the two operators run on a backend."""

    def forward_only(*args: Any) -> Any:
        return forward(Call(*args, backend=backend), backend)

    def with_gradients(*args: Any) -> Any:
        return gradients(Call(*args[:-1], backend=backend), backend, args[-1])

    return forward_only, with_gradients
