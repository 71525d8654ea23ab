"""Vocabularies in shards against one process; run as a script by its test."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from helpers.budget import assert_within_budget
from helpers.processes import fork
from kdkernels.api.parallel import vocab_parallel_kd_loss, vocab_parallel_linear_kd_loss
from kdkernels.ops._shared import vocab_rows

ROWS, VOCAB, WIDTH = 11, 37, 6
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd", "tvd")
# Each has what the others lack.
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 2.0, "alpha": 0.3},
    {"temperature": 1.0, "ce_weight": 0.7, "kd_weight": 1.5, "label_smoothing": 0.1},
    {
        "temperature": 3.0, "alpha": 0.5, "label_smoothing": 0.2, "smoothing_convention": "tfkd",
        "z_loss": 0.01, "softcap": 40.0, "logit_scale": (0.8, 1.3), "reduction": "element_mean",
    },
    {"alpha": 1.0, "vocab_size": VOCAB - 9, "reduction": "sum"},
    {"temperature": 2.0, "reduction": "batchmean", "scale_t2": False, "beta": 0.2},
    {"temperature": 1.5, "num_items_in_batch": 5, "ignore_index": 3},
    {"temperature": 0.5, "reduction": "none"},
]  # fmt: skip


def rank_and_world() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sizes_of(world: int) -> list[int]:
    """Uneven ones, which are no even division's."""
    return [VOCAB - 2, 2] if world == 2 else [5, 0, 20, VOCAB - 25]


def data(dtype: torch.dtype) -> dict[str, Tensor]:
    """The same on all processes; invalid rows hold NaN, some classes are masked."""
    torch.manual_seed(1)
    found = {
        "student": 4.0 * torch.randn(ROWS, VOCAB, dtype=torch.float64) + 30.0,
        "teacher": 4.0 * torch.randn(ROWS, VOCAB, dtype=torch.float64) - 20.0,
        "hidden": torch.randn(ROWS, WIDTH, dtype=torch.float64),
        "teacher_hidden": torch.randn(ROWS, WIDTH + 2, dtype=torch.float64),
        "head": 2.0 * torch.randn(VOCAB, WIDTH, dtype=torch.float64),
        "teacher_head": 2.0 * torch.randn(VOCAB, WIDTH + 2, dtype=torch.float64),
        "bias": torch.randn(VOCAB, dtype=torch.float64),
    }
    for name in ("student", "teacher", "hidden", "teacher_hidden"):
        found[name][2] = torch.nan
    for name in ("student", "teacher"):  # of four processes the third knows nothing but masks
        found[name][5, 4:25] = -torch.inf
    found = {name: x.to(dtype) for name, x in found.items()}
    labels = torch.randint(VOCAB - 9, (ROWS,))
    labels[5], labels[2], labels[7] = 1, -100, VOCAB - 10
    found["labels"] = labels
    found["mask"] = torch.ones(ROWS).index_fill(0, torch.tensor([2, 9]), 0.0)
    found["row_weights"] = torch.rand(ROWS) + 0.5
    return found


def cut(x: Tensor, sizes: list[int], rank: int, dim: int = 0) -> Tensor:
    return x.split(sizes, dim)[rank].clone()


def loss_and_gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a loss per row by weights that differ."""
    weights = torch.arange(1.0, 1.0 + loss.numel()).view(loss.shape).to(loss)
    (loss * weights).sum().backward()
    return [loss.detach(), *(x.grad for x in leaves)]  # type: ignore[misc]


def assert_equal_parts(
    actual: list[Tensor], whole: list[list[Tensor]], dtype: torch.dtype, parts: list[Any]
) -> None:
    """Against the float64 oracle and the reference in the same dtype, of which these are parts."""
    for x, oracle, reference, part in zip(actual, *whole, parts, strict=True):
        wanted = x.dtype if x.dtype != torch.float64 else torch.float64
        unit = float(oracle.abs().max())
        assert_within_budget(x, part(oracle), part(reference), wanted, unit=unit)


def call_options(options: dict[str, Any], d: dict[str, Tensor]) -> dict[str, Any]:
    return {"mask": d["mask"], "row_weights": d["row_weights"], **options}


def logits_like_one_process(divergence: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    rank, world = rank_and_world()
    sizes = sizes_of(world)
    options = {**options, "divergence": divergence}
    labels_at = options.get("ignore_index", -100)

    def whole(as_dtype: torch.dtype) -> list[Tensor]:
        d = data(dtype)
        labels = d["labels"].masked_fill(d["labels"] == -100, labels_at)
        student = d["student"].to(as_dtype).requires_grad_()
        loss = kdkernels.kd_loss(
            student, d["teacher"].to(as_dtype), labels, backend="reference",
            **call_options(options, d),
        )  # fmt: skip
        return loss_and_gradients(loss, [student])

    d = data(dtype)
    labels = d["labels"].masked_fill(d["labels"] == -100, labels_at)
    mine = cut(d["student"], sizes, rank, 1).requires_grad_()
    loss = vocab_parallel_kd_loss(
        mine, cut(d["teacher"], sizes, rank, 1), labels, shards=sizes, chunk_rows=4,
        **call_options(options, d),
    )  # fmt: skip
    actual = loss_and_gradients(loss, [mine])
    parts = [lambda x: x, lambda x: cut(x, sizes, rank, 1)]
    assert_equal_parts(actual, [whole(torch.float64), whole(dtype)], dtype, parts)
    everywhere = [torch.empty_like(actual[0]) for _ in range(world)]
    torch.distributed.all_gather(everywhere, actual[0])
    assert all(torch.equal(x, actual[0]) for x in everywhere)


def heads_like_one_process(
    divergence: str, options: dict[str, Any], dtype: torch.dtype, sharded: bool
) -> None:
    """With plain parts of uneven sizes, or DTensors."""
    rank, world = rank_and_world()
    mesh = init_device_mesh("cpu", (world,))
    most = -(-VOCAB // world)
    sizes = [min(most, VOCAB - i * most) for i in range(world)] if sharded else sizes_of(world)
    options = {**options, "divergence": divergence, "shift": 1}

    def leaves_of(as_dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        d = data(dtype)
        d = {k: x.to(as_dtype) if x.dtype == dtype and k != "labels" else x for k, x in d.items()}
        d["labels"] = d["labels"].clamp(min=0) if "ignore_index" in options else d["labels"]
        d["hidden"], d["teacher_hidden"] = d["hidden"][None], d["teacher_hidden"][None]
        d |= {name: d[name][None] for name in ("labels", "mask", "row_weights")}
        # Where row 2 is scored, its target is row 3's: it must hold numbers unless masked there.
        d["mask"][:, 3] = 0.0
        return [d["hidden"], d["head"], d["bias"]], d

    def whole(as_dtype: torch.dtype) -> list[Tensor]:
        leaves, d = leaves_of(as_dtype)
        hidden, head, bias = (x.requires_grad_() for x in leaves)
        loss = kdkernels.linear_kd_loss(
            hidden, head, d["teacher_hidden"], d["teacher_head"], d["labels"], student_bias=bias,
            backend="reference", **call_options(options, d),
        )  # fmt: skip
        return loss_and_gradients(loss, [hidden, head, bias])

    (hidden, head, bias), d = leaves_of(dtype)

    def part(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(0)]) if sharded else cut(x, sizes, rank)

    mine = [hidden.requires_grad_(), part(head).requires_grad_(), part(bias).requires_grad_()]
    loss = vocab_parallel_linear_kd_loss(
        mine[0], mine[1], d["teacher_hidden"], part(d["teacher_head"]), d["labels"],
        student_bias=mine[2], chunk_rows=3, shards=None if sharded else sizes,
        **call_options(options, d),
    )  # fmt: skip
    actual = loss_and_gradients(loss, mine)
    if sharded:
        assert all(isinstance(x, DTensor) and x.placements == (Shard(0),) for x in actual[2:])
        actual[2:] = [x.to_local() for x in actual[2:]]  # type: ignore[attr-defined]
    parts = [lambda x: x, lambda x: x, *[lambda x: cut(x, sizes, rank)] * 2]
    assert_equal_parts(actual, [whole(torch.float64), whole(dtype)], dtype, parts)


def like_one_process() -> None:
    for i, divergence in enumerate(DIVERGENCES):
        for j, options in enumerate(OPTIONS):
            if rank_and_world()[1] > 2 and (i + j) % 2:
                continue
            # By two processes all in float64, in the other dtypes a part of them.
            for dtype in DTYPES if (i + j) % 3 == 0 else DTYPES[:1]:
                try:
                    logits_like_one_process(divergence, options, dtype)
                    heads_like_one_process(divergence, options, dtype, sharded=(i + j) % 4 > 1)
                except AssertionError as error:
                    raise AssertionError(f"{divergence}, {options}, {dtype}") from error


def cross_entropy_alone() -> None:
    rank, world = rank_and_world()
    sizes, d = sizes_of(world), data(torch.float64)
    whole = d["student"].clone().requires_grad_()
    options = {"label_smoothing": 0.1, "return_parts": True}
    expected = kdkernels.kd_loss(whole, None, d["labels"], backend="reference", **options)
    mine = cut(d["student"], sizes, rank, 1).requires_grad_()
    actual = vocab_parallel_kd_loss(mine, None, d["labels"], shards=sizes, **options)
    torch.testing.assert_close(list(actual), list(expected))
    expected.loss.backward(), actual.loss.backward()
    torch.testing.assert_close(mine.grad, cut(whole.grad, sizes, rank, 1))
    with torch.no_grad():  # the loss alone
        again = vocab_parallel_kd_loss(mine, None, d["labels"], shards=sizes, label_smoothing=0.1)
    assert torch.equal(again, actual.loss)


def autocast() -> None:
    """float32 hidden states and heads under bfloat16."""
    rank, world = rank_and_world()
    sizes, d = sizes_of(world), data(torch.float32)
    leaves = [d["hidden"].requires_grad_(), d["head"].requires_grad_()]
    mine = [d["hidden"].detach().clone().requires_grad_(), cut(d["head"].detach(), sizes, rank)]
    mine[1].requires_grad_()
    teacher = d["teacher_hidden"], d["teacher_head"]
    with torch.autocast("cpu", torch.bfloat16):
        kdkernels.linear_kd_loss(*leaves, *teacher, d["labels"]).backward()
        part = teacher[0], cut(teacher[1], sizes, rank)
        vocab_parallel_linear_kd_loss(*mine, *part, d["labels"], shards=sizes).backward()
    eps = torch.finfo(torch.bfloat16).eps
    for x, whole, part_of in zip(
        mine, leaves, (lambda x: x, lambda x: cut(x, sizes, rank)), strict=True
    ):
        bound = eps * whole.grad.abs().max()  # type: ignore[union-attr]
        assert ((x.grad - part_of(whole.grad)).abs() <= bound).all()  # type: ignore[operator]


def compiled() -> None:
    """One graph, exchanges included, that gives what eager calls do."""
    rank, world = rank_and_world()
    sizes, d = sizes_of(world), data(torch.float32)
    options: dict[str, Any] = {"shards": sizes, "temperature": 2.0}
    logits = cut(d["student"], sizes, rank, 1).requires_grad_()
    heads = d["hidden"].requires_grad_(), cut(d["head"], sizes, rank).requires_grad_()
    calls: list[tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]] = [
        (vocab_parallel_kd_loss, (logits,), (cut(d["teacher"], sizes, rank, 1),)),
        (
            vocab_parallel_linear_kd_loss,
            heads,
            (d["teacher_hidden"], cut(d["teacher_head"], sizes, rank)),
        ),
    ]
    for function, leaves, teacher in calls:
        for divergence in ("forward_kl", "jsd"):

            def step(*args: Tensor, function: Any = function, kind: str = divergence) -> Tensor:
                return function(*args, d["labels"], divergence=kind, **options)

            expected = step(*leaves, *teacher)
            torch._dynamo.reset()
            loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, *teacher)
            torch.testing.assert_close(loss, expected)
            for x, y in zip(
                *(torch.autograd.grad(x, leaves) for x in (loss, expected)), strict=True
            ):
                torch.testing.assert_close(x, y)


def corners() -> None:
    """Equal models, a mass that is all elsewhere, infinite losses, no valid row, no row."""
    rank, world = rank_and_world()
    sizes = sizes_of(world)
    d = data(torch.float32)
    d["student"][2] = 1.0
    for divergence in DIVERGENCES:
        if divergence == "soft_ce":  # its value is the teacher's entropy
            continue
        mine = cut(d["student"], sizes, rank, 1).requires_grad_()
        loss = vocab_parallel_kd_loss(
            mine, mine.detach().clone(), divergence=divergence, temperature=2.0, shards=sizes
        )
        loss.backward()
        assert loss == 0.0 and mine.grad is not None and not mine.grad.any(), divergence
    far = torch.zeros(2, VOCAB)
    far[0, 0], far[1, -1] = 1e4, -1e4
    expected = kdkernels.kd_loss(far, far.flip(0), reduction="none", backend="reference")
    actual = vocab_parallel_kd_loss(
        cut(far, sizes, rank, 1), cut(far.flip(0), sizes, rank, 1), shards=sizes, reduction="none"
    )
    torch.testing.assert_close(actual, expected)
    masked = torch.zeros(1, VOCAB)
    masked[0, -1] = -torch.inf  # the teacher gives it mass
    mine = cut(masked, sizes, rank, 1).requires_grad_()
    loss = vocab_parallel_kd_loss(mine, torch.zeros(1, sizes[rank]), shards=sizes)
    loss.backward()
    assert loss == torch.inf and torch.isfinite(mine.grad).all()  # type: ignore[arg-type]
    for rows, labels in ((3, torch.full((3,), -100)), (0, torch.zeros(0).long())):
        mine = torch.full((rows, sizes[rank]), torch.nan).requires_grad_()
        loss = vocab_parallel_kd_loss(mine, mine.detach(), labels, shards=sizes)
        loss.backward()
        assert loss == 0.0 and not mine.grad.any()  # type: ignore[union-attr]
        hidden = torch.full((rows, WIDTH), torch.nan).requires_grad_()
        head = torch.randn(sizes[rank], WIDTH).requires_grad_()
        loss = vocab_parallel_linear_kd_loss(hidden, head, None, None, labels, shards=sizes)
        loss.backward()
        assert loss == 0.0 and not hidden.grad.any() and not head.grad.any()  # type: ignore[union-attr]


def logits_as_dtensors() -> None:
    """On a mesh of which only one dimension divides the vocabulary."""
    world = rank_and_world()[1]
    mesh = init_device_mesh("cpu", (world // 2, 2))
    d = data(torch.float64)
    places = [Replicate(), Shard(1)]
    whole = d["student"].clone().requires_grad_()
    expected = kdkernels.kd_loss(whole, d["teacher"], d["labels"], backend="reference")
    expected.backward()
    mine = distribute_tensor(d["student"], mesh, places).requires_grad_()
    loss = vocab_parallel_kd_loss(mine, distribute_tensor(d["teacher"], mesh, places), d["labels"])
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(mine.grad.full_tensor(), whole.grad)


class _Largest(TorchDispatchMode):
    """The largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def memory_and_exchange() -> None:
    """Of 256 rows the logits of 16 exist at a time; a chunk of forward KL is one exchange."""
    _, world = rank_and_world()
    rows, size = 256, 40
    places = {"_all_gather": vocab_rows, "all_reduce": torch.distributed}
    calls = dict.fromkeys(places, 0)
    originals = {name: getattr(place, name) for name, place in places.items()}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name, place in places.items():
        setattr(place, name, counted(name))
    hidden = torch.randn(rows, 4, requires_grad=True)
    head, labels = torch.randn(size, 4, requires_grad=True), torch.randint(size * world, (rows,))
    for divergence, exchanges in (("forward_kl", 1), ("jsd", 2)):
        calls.update(dict.fromkeys(calls, 0))
        with _Largest() as seen:
            vocab_parallel_linear_kd_loss(
                hidden, head, torch.randn(rows, 4), torch.randn(size, 4), labels,
                divergence=divergence, temperature=2.0, chunk_rows=16,
            ).backward()  # fmt: skip
        # Beside them the hidden states and what is gathered, some numbers a row.
        assert seen.elements <= max(16 * size, rows * 4, world * 16 * 9), seen.elements
        # One for the check that all agree, and one a chunk for the hidden states.
        assert calls == {"_all_gather": 16 * exchanges, "all_reduce": 1 + 16}, calls
    for name, place in places.items():
        setattr(place, name, originals[name])


def refused(function: Any, message: str, *args: Any, **options: Any) -> None:
    try:
        function(*args, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {message}")


def refusals() -> None:
    rank, world = rank_and_world()
    x, labels = torch.randn(4, 5), torch.zeros(4).long()
    loss, linear = vocab_parallel_kd_loss, vocab_parallel_linear_kd_loss
    refused(loss, "inplace must be one of temperature", x, x, labels, inplace=True)
    refused(loss, "backend must be one of native", x, x, labels, backend="none")
    refused(loss, f"shards must be {world} sizes", x, x, labels, shards=[5])
    refused(loss, "must have the 6 classes of process", x, x, labels, shards=[6] * world)
    refused(loss, "teacher_logits must have the 5 classes", x, torch.randn(4, 6), labels)
    refused(loss, f"labels must be in [0, {5 * world})", x, x, labels + 5 * world)
    refused(loss, f"at most the classes of all shards, {5 * world}", x, x, labels, vocab_size=99)
    refused(loss, "teacher_logits must not require grad", x, x.clone().requires_grad_(), labels)
    refused(loss, "chunk_rows must be 1 or more", x, x, labels, chunk_rows=0)
    own = torch.randn(4 + rank, 5)
    refused(loss, "group must have the same rows", own, own, torch.zeros(4 + rank).long())
    refused(loss, "group must have the same rows", *[torch.randn(4, 5 + (rank == 0))] * 2, labels)
    refused(loss, "group must have the same rows", x, x, torch.full((4,), -100 if rank else 0))
    mesh = init_device_mesh("cpu", (world,))
    whole = distribute_tensor(x, mesh, [Replicate()])
    refused(loss, "must be sharded by dimension 1 over one", whole, None, labels)
    part = distribute_tensor(torch.randn(4, 8), mesh, [Shard(1)])
    refused(loss, "group and shards must be left out", part, None, labels, shards=[1] * world)
    other = distribute_tensor(torch.randn(4, 9 + world), mesh, [Shard(1)])
    refused(loss, "teacher_logits must be divided as student_logits", part, other, labels)
    head, hidden = distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)]), torch.randn(4, 4)
    refused(linear, "teacher_weight must be given together", hidden, head, hidden, None, labels)
    divided = distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])
    refused(linear, "student_hidden must be replicated", divided, head, None, None, labels)
    refused(linear, "student_weight must be [vocab, 3]", hidden[:, :3], head, None, None, labels)
    grown = x.clone().requires_grad_()
    total = loss(grown, x)
    refused(torch.autograd.grad, "create_graph must be False", total, grown, create_graph=True)


def main() -> None:
    numbers = like_one_process, cross_entropy_alone, autocast, corners, logits_as_dtensors
    for case in (*numbers, compiled, memory_and_exchange, refusals):
        print(case.__name__, flush=True)
        case()


if __name__ == "__main__":
    fork(int(sys.argv[1]), main)
