"""A step over one batch, over its micro-batches and over two processes, for every loss with a
denominator; run as a script by its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kdkernels
from helpers.processes import fork
from kdkernels import LabelRegulariser
from kdkernels.api.methods.label_regularisation import METHODS

WIDTH, HEADS, SEQ = 12, 3, 6
Batch = dict[str, Tensor]
Loss = Callable[..., Tensor]


class Student(nn.Module):
    """Gives a loss of what stands for logits, hidden states, queries and keys.

    DistributedDataParallel wants to know of every use of a parameter, and every one used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, b: Batch, loss: Loss, count: Tensor | None) -> Tensor:
        found = loss(self.body(b["x"]), self, b, num_items_in_batch=count)
        return found + 0.0 * self.head.weight.sum()


def batches() -> list[Batch]:
    """Four micro-batches of 1, 3, 2 and 1 texts, of which very different numbers of tokens count;
    in the last none.
    """
    made = torch.Generator().manual_seed(3)
    found = []
    for rows, share in ((1, 0.9), (3, 0.2), (2, 0.6), (1, 0.0)):
        shape = rows, SEQ

        def normal(*sizes: int, shape: tuple[int, int] = shape) -> Tensor:
            return torch.randn(*shape, *sizes, generator=made, dtype=torch.float64)

        counts = torch.rand(shape, generator=made) < share
        labels = torch.randint(WIDTH, shape, generator=made)
        ids = normal(WIDTH).topk(4).indices
        found.append(
            {
                "x": normal(5),
                "labels": labels.masked_fill(~counts, -100),
                "mask": counts.double(),
                "teacher": normal(WIDTH),
                "second": normal(WIDTH),
                "ids": ids,
                "logprobs": normal(WIDTH).log_softmax(-1).gather(-1, ids),
            }
        )
    return found


HEAD = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4)).double()


def split(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def maps(x: Tensor, b: Batch) -> Tensor:
    """Of attention, over the tokens that count."""
    scores = split(x) @ split(x).transpose(2, 3)
    return scores.masked_fill(b["mask"][:, None, None] == 0, -1e9).softmax(-1)


def losses() -> dict[str, tuple[Loss, dict[str, Any]]]:
    """By name: the loss of the student's output, itself and a batch; what its rows are."""
    k = kdkernels
    shifted: dict[str, Any] = {"labels": True, "shift": 1}
    plain: dict[str, Any] = {"labels": True}
    rows: dict[str, Any] = {"mask": True}
    heads: dict[str, Any] = {"mask": True, "units": HEADS}
    found: dict[str, tuple[Loss, dict[str, Any]]] = {
        "linear_kd_loss": (
            lambda s, m, b, **o: k.linear_kd_loss(
                s, m.head.weight, b["teacher"], HEAD, b["labels"], shift=1, chunk_rows=4, **o
            ),
            shifted,
        ),
        "topk_kd_loss": (
            lambda s, m, b, **o: k.topk_kd_loss(s, b["ids"], b["logprobs"], b["labels"], **o),
            plain,
        ),
        "linear_topk_kd_loss": (
            lambda s, m, b, **o: k.linear_topk_kd_loss(
                s, m.head.weight, b["ids"], b["logprobs"], b["labels"], shift=1, **o
            ),
            shifted,
        ),
        "label_smoothing_loss": (
            lambda s, m, b, **o: k.label_smoothing_loss(s, b["labels"], **o),
            plain,
        ),
        "tfkd_reg_loss": (
            lambda s, m, b, **o: k.tfkd_reg_loss(s, b["labels"], alpha=0.4, temperature=9.0, **o),
            plain,
        ),
        "tfkd_self_loss": (
            lambda s, m, b, **o: k.tfkd_self_loss(
                s, b["teacher"], b["labels"], alpha=0.4, temperature=3.0, **o
            ),
            plain,
        ),
        "confidence_penalty_loss": (
            lambda s, m, b, **o: k.confidence_penalty_loss(s, b["labels"], shift=1, **o),
            shifted,
        ),
        "kd_loss, mask": (
            lambda s, m, b, **o: k.kd_loss(s, b["teacher"], mask=b["mask"], shift=1, **o),
            {"mask": True, "shift": 1},
        ),
        "hidden_match_many": (
            lambda s, m, b, **o: k.hidden_match_many(
                [(s, b["teacher"]), (s, b["second"])], projections=[m.head, None], kind="cosine",
                mask=b["mask"], **o,
            ),
            rows,
        ),
        "relation_match_loss": (
            lambda s, m, b, **o: k.relation_match_loss(
                s, b["teacher"], num_relation_heads=HEADS, mask=b["mask"], **o
            ),
            heads,
        ),
    }  # fmt: skip
    for divergence in ("forward_kl", "soft_ce", "reverse_kl", "jsd", "tvd"):

        def of_logits(s: Tensor, m: Any, b: Batch, kind: str = divergence, **o: Any) -> Tensor:
            return k.kd_loss(s, b["teacher"], b["labels"], shift=1, divergence=kind, **o)

        found[f"kd_loss, {divergence}"] = of_logits, shifted
    for combine in ("probability", "loss"):

        def of_teachers(s: Tensor, m: Any, b: Batch, how: str = combine, **o: Any) -> Tensor:
            teachers = [b["teacher"], b["second"]]
            return k.multi_teacher_kd_loss(s, teachers, b["labels"], combine=how, **o)

        found[f"multi_teacher_kd_loss, {combine}"] = of_teachers, plain
    for kind in ("mse", "smooth_l1", "cosine", "pkd"):

        def of_states(s: Tensor, m: Any, b: Batch, kind: str = kind, **o: Any) -> Tensor:
            return k.hidden_match_loss(s, b["teacher"], kind=kind, mask=b["mask"], **o)

        found[f"hidden_match_loss, {kind}"] = of_states, rows
    for kind in ("mse", "kl"):

        def of_scores(s: Tensor, m: Any, b: Batch, kind: str = kind, **o: Any) -> Tensor:
            pairs = (split(s), split(2 * s)), (split(b["teacher"]), split(b["second"]))
            return k.attention_match_loss(*pairs, kind=kind, mask=b["mask"], **o)

        def of_maps(s: Tensor, m: Any, b: Batch, kind: str = kind, **o: Any) -> Tensor:
            pair = maps(s, b), maps(b["teacher"], b)
            return k.attention_match_loss(*pair, kind=kind, mask=b["mask"], **o)

        found[f"attention_match_loss, {kind}"] = of_scores, heads
        found[f"attention_match_loss, maps, {kind}"] = of_maps, heads
    for method in METHODS:
        found[f"LabelRegulariser, {method}"] = partial(regularised, LabelRegulariser(method)), plain
    return found


def regularised(loss: LabelRegulariser, s: Tensor, m: Any, b: Batch, **o: Any) -> Tensor:
    return loss(s, b["labels"], b["teacher"] if loss.needs_teacher else None, **o)  # type: ignore[no-any-return]


def together(parts: Sequence[Batch]) -> Batch:
    return {name: torch.cat([b[name] for b in parts]) for name in parts[0]}


def count_of(parts: Sequence[Batch], what: dict[str, Any], **options: Any) -> Tensor:
    given = {key: [b[key] for b in parts] for key in ("labels", "mask") if what.get(key)}
    rest = {key: value for key, value in what.items() if key not in given}
    return kdkernels.global_valid_count(**given, **rest, **options)


def step(
    model: nn.Module, parts: Sequence[Batch], loss: Loss, count: Tensor | None
) -> list[Tensor]:
    """The loss of all parts together, and the gradients they leave."""
    total = torch.zeros((), dtype=torch.float64)
    own = model.module if isinstance(model, DistributedDataParallel) else model
    own.zero_grad()
    for b in parts:
        one = model(b, loss, count)
        one.backward()
        total += one.detach()
    return [total, *(torch.zeros_like(p) if p.grad is None else p.grad for p in own.parameters())]


def main() -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    alone = torch.distributed.new_group([rank], use_local_synchronization=True)
    model, parts = Student().double(), batches()
    parallel = DistributedDataParallel(model)
    for name, (loss, what) in losses().items():
        count = count_of(parts, what, group=alone)
        whole = [x.clone() for x in step(model, [together(parts)], loss, None)]
        accumulated = [x.clone() for x in step(model, parts, loss, count)]
        mine = parts[rank::world]
        over_all = count_of(mine, what)
        assert torch.equal(over_all, count), name
        shared = step(parallel, mine, loss, count_of(mine, what, averaged=True))
        torch.distributed.all_reduce(shared[0])
        shared[0] /= world
        for actual in (accumulated, shared):
            for x, expected in zip(actual, whole, strict=True):
                torch.testing.assert_close(x, expected, msg=lambda m, name=name: f"{name}: {m}")
        # The mean of means is another number, or nothing was shown.
        means = step(model, parts, loss, None)[0] / len(parts)
        assert abs(means - whole[0]) > 1e-3 * abs(whole[0]), name


if __name__ == "__main__":
    fork(2, main)
