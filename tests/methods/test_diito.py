"""Causal distillation: its draws, its alignments, and its loss against the released scheme."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels
from kdkernels import DIITO, Alignment, Positions, Spans
from kdkernels.api.methods.alignment import NAMES, AlignedLayers
from kdkernels.bench.cases import Setting
from kdkernels.bench.measure import check
from kdkernels.bench.steps.diito_step import CASE

transformers = pytest.importorskip("transformers")

PUBLISHED = {
    ("single_middle", 3): [((6,), (1,))],
    ("single_middle", 6): [((6,), (3,))],
    ("single_middle", 9): [((6,), (4,))],
    ("middle_late", 3): [((9,), (0,)), ((10,), (1,))],
    ("middle_late", 6): [((9,), (3,)), ((10,), (4,))],
    ("multilayer", 3): [((0, 1, 2, 3), (0,)), ((4, 5, 6, 7), (1,)), ((8, 9, 10, 11), (2,))],
    ("multilayer", 6): [((2 * i, 2 * i + 1), (i,)) for i in range(6)],
    ("multilayer", 9): [((2 * i, 2 * i + 1), (i,)) for i in range(3)]
    + [((i + 3,), (i,)) for i in range(3, 9)],
}
SIZES = {
    "vocab_size": 53,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BACKEND = kdkernels.available_backends("interchange")[0]
LENGTHS = torch.tensor([9, 5, 7, 3])


def models(kind: str = "SequenceClassification", **sizes: Any) -> tuple[Any, Any]:
    """Teacher of six layers and student of three."""
    torch.manual_seed(0)
    auto = getattr(transformers, f"BertFor{kind}")
    made = [
        auto(transformers.BertConfig(num_hidden_layers=n, num_labels=3, **{**SIZES, **sizes}))
        for n in (6, 3)
    ]
    return made[0].eval(), made[1].train()


def batch(labels: Tensor | None = None, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {
        "input_ids": torch.randint(53, (4, 9), generator=generator),
        "attention_mask": (torch.arange(9) < LENGTHS[:, None]).long(),
    }
    return found if labels is None else {**found, "labels": labels}


TASK_LABELS = torch.tensor([0, 2, 1, 0])
TOKEN_LABELS = torch.where(
    (torch.arange(9) % 3 == 1) & (torch.arange(9) < LENGTHS[:, None]),
    torch.randint(53, (4, 9), generator=torch.Generator().manual_seed(5)),
    -100,
)


@pytest.mark.parametrize(("name", "layers"), PUBLISHED)
def test_published_alignments(name: str, layers: int) -> None:
    found = Alignment.named(name, 12, layers)
    assert [(m.teacher, m.student) for m in found.mappings] == PUBLISHED[name, layers]


def test_alignments_of_any_depth_use_layers_that_exist() -> None:
    for name, teacher in itertools.product(NAMES, range(3, 15)):
        for student in range(3, teacher + 1):
            mappings = Alignment.named(name, teacher, student).mappings
            if name == "multilayer":  # every layer of either, once
                assert sum((m.teacher for m in mappings), ()) == tuple(range(teacher))
                assert sum((m.student for m in mappings), ()) == tuple(range(student))


def test_alignment_files(tmp_path: Path) -> None:
    heads = AlignedLayers((1,), (0,), teacher_dims=(0, 8), student_dims=(8, 16))
    for alignment in (Alignment(6, 3, (heads,)), Alignment.named("multilayer", 6, 3)):
        alignment.save(tmp_path / "a.json")
        assert Alignment.load(tmp_path / "a.json") == alignment
    (tmp_path / "bad.json").write_text('{"teacher_layers": 2}')
    with pytest.raises(ValueError, match="path must hold JSON with teacher_layers, .*'mappings'"):
        Alignment.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="path must name a readable file, got "):
        Alignment.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"teacher layers of a mapping must be .*0..1, got \[2"):
        Alignment(2, 1, (AlignedLayers((2,), (0,)),))
    with pytest.raises(ValueError, match="student_layers must be at least 3 for middle_late"):
        Alignment.named("middle_late", 6, 2)


@pytest.mark.parametrize("row", [None, torch.tensor([2, 0, 3, 1])])
def test_spans_fit_their_rows(row: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    base, source = torch.tensor([20, 11, 7, 1]), torch.tensor([10, 30, 2, 9])
    of = source if row is None else source[row]
    seen = set()
    for _ in range(200):
        spans = kdkernels.sample_spans(base, source, source_row=row, generator=generator)
        assert torch.equal(spans.length, (0.3 * torch.minimum(base, of).double()).long())
        assert bool((spans.base_start >= 0).all() and (spans.source_start >= 0).all())
        assert bool((spans.base_start + spans.length <= base).all())
        assert bool((spans.source_start + spans.length <= of).all())
        seen.add(int(spans.base_start[0]))
    assert seen == set(range(20 - int(spans.length[0]) + 1))  # every place, the last one too
    assert int(kdkernels.sample_spans(base, source, max_length=1).length.max()) == 1


def test_positions_are_drawn_once_and_never_from_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    base, source, row = torch.tensor([20, 11, 7]), torch.tensor([10, 30, 2]), [1, 0, 2]
    for _ in range(50):
        found = kdkernels.sample_positions(
            base, source, share=0.5, source_row=torch.tensor(row), generator=generator
        )
        for b, count in enumerate((10, 5, 1)):
            mine = found.base_index[:, 0] == b
            to, of = found.base_index[mine, 1].tolist(), found.source_index[mine, 1].tolist()
            assert len(set(to)) == len(set(of)) == count and sorted(to) == to and sorted(of) == of
            assert max(to) < base[b] and max(of) < source[row[b]]
            assert set(found.source_index[mine, 0].tolist()) == {row[b]}


def test_masked_positions_stay_in_the_source() -> None:
    masked = torch.tensor([[False, True, True], [True, False, False]])
    found = kdkernels.masked_positions(
        masked, torch.tensor([3, 2]), source_row=torch.tensor([1, 0])
    )
    assert found.base_index.tolist() == [[0, 1], [1, 0]]
    assert found.source_index.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_lm_is_the_released_scheme(dtype: torch.dtype) -> None:
    """Loss and all gradients: three whole passes and masked_select, in float64, are the oracle."""
    setting = Setting("cpu", dtype, "consecutive")
    checks = check(CASE, setting, (2, 24), CASE.ours(setting, BACKEND))
    assert len(checks) > 50
    assert not [str(one) for one in checks if not one.passed]


def by_hand(
    teacher: Any, student: Any, base: dict[str, Tensor], spans: Spans, mapping: AlignedLayers
) -> tuple[Tensor, Tensor]:
    """Distillation and counterfactual divergence of a task, T = 2, by hooks and whole passes."""
    given = {key: base[key] for key in ("input_ids", "attention_mask")}

    def runs(model: Any, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        sites = [model.bert.encoder.layer[layer] for layer in layers]
        taken: dict[nn.Module, Tensor] = {}
        hooks = [s.register_forward_hook(lambda m, x, y: taken.update({m: y})) for s in sites]
        logits = model(**given).logits
        for hook in hooks:
            hook.remove()

        def swap(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            for b, row in enumerate(spans.source_row.tolist()):
                to, of, n = (int(x[b]) for x in spans[:3])
                changed[b, to : to + n] = taken[module][row, of : of + n]
            return changed

        hooks = [site.register_forward_hook(swap) for site in sites]
        after = model(**given).logits
        for hook in hooks:
            hook.remove()
        return logits, after

    with torch.no_grad():
        taught = runs(teacher, mapping.teacher)
    learnt = runs(student, mapping.student)
    kl = [
        nn.functional.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")
        for s, t in zip(learnt, taught, strict=True)
    ]
    return 4 * kl[0], 4 * kl[1]


def test_task_form_by_hand() -> None:
    teacher, student = models()
    mapping = Alignment.named("multilayer", 6, 3).mappings[1]
    spans = Spans(
        torch.tensor([0, 1, 2, 0]),
        torch.tensor([0, 2, 1, 1]),
        torch.tensor([3, 2, 1, 0]),
        torch.tensor([1, 2, 3, 0]),
    )
    base = batch(TASK_LABELS)
    diito = DIITO(student, teacher, Alignment(6, 3, (mapping,)), form="task")
    parts = diito(base, where=spans, return_parts=True)
    kd, after = by_hand(teacher, student, base, spans, mapping)
    torch.testing.assert_close([parts.kd, parts.cf_kd], [kd.detach(), after.detach()])
    logits = student(input_ids=base["input_ids"], attention_mask=base["attention_mask"]).logits
    ce = nn.functional.cross_entropy(logits, TASK_LABELS)
    expected = 0.5 * kd + 0.5 * ce + after
    torch.testing.assert_close(parts.loss, expected)
    weights = list(student.parameters())
    grads = [torch.autograd.grad(x, weights, allow_unused=True) for x in (parts.loss, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    by_class = DIITO(student, teacher, Alignment(6, 3, (mapping,)), form="task", kl_mean="class")(
        base, where=spans, return_parts=True
    )
    torch.testing.assert_close(by_class.cf_kd, after.detach() / 3)


@pytest.mark.parametrize("positions", ["consecutive", "random", "masked"])
@pytest.mark.parametrize("index_mode", ["aligned", "release"])
def test_reuse_changes_nothing(positions: str, index_mode: str) -> None:
    teacher, student = models("MaskedLM")
    options = {"positions": positions, "index_mode": index_mode, "seed": 3}
    found = []
    for reuse in (True, False):
        diito = DIITO(student, teacher, cf_cosine_weight=0.5, reuse=reuse, **options)
        parts = diito(batch(TOKEN_LABELS), batch(seed=2), return_parts=True)
        grads = torch.autograd.grad(parts.loss, [*student.bert.encoder.parameters()])
        found.append((parts, grads))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_a_source_equal_to_its_base_changes_nothing_when_aligned() -> None:
    teacher, student = models("MaskedLM")
    zero = torch.zeros(4, dtype=torch.int64)
    spans = Spans(zero, zero, LENGTHS)
    equal = {}
    for index_mode in ("aligned", "release"):
        diito = DIITO(student, teacher, index_mode=index_mode)
        parts = diito(batch(TOKEN_LABELS), batch(), where=spans, return_parts=True)
        equal[index_mode] = torch.equal(parts.kd, parts.cf_kd)
    assert equal == {"aligned": True, "release": False}


def test_the_baseline_runs_no_counterfactual() -> None:
    teacher, student = models()
    seen: list[str] = []
    for who, model in (("teacher", teacher), ("student", student)):
        layer = model.bert.encoder.layer[-1]
        layer.register_forward_hook(lambda m, x, y, who=who: seen.append(who))
    diito = DIITO(student, teacher, form="task", cf_weight=0.0)
    parts = diito(batch(TASK_LABELS), return_parts=True)
    assert seen == ["teacher", "student"] and parts.cf_kd is None and parts.cosine is None
    assert DIITO(student, teacher, form="task")(batch(TASK_LABELS)) > 0
    assert seen == ["teacher", "student"] + ["teacher"] * 2 + ["student"] * 2


def test_draws_go_on_from_a_state() -> None:
    teacher, student = models()
    diito, other = (DIITO(student, teacher, "multilayer", form="task", seed=s) for s in (1, 2))
    diito(batch(TASK_LABELS))
    other.load_state_dict(diito.state_dict())
    for _ in range(3):
        assert torch.equal(diito(batch(TASK_LABELS)), other(batch(TASK_LABELS)))


def test_token_labels_and_padding_of_a_task() -> None:
    """A tagger: padding takes part in nothing, whatever its ids are."""
    teacher, student = models("TokenClassification")
    labels = torch.where(TOKEN_LABELS == -100, -100, TOKEN_LABELS % 3)
    losses = []
    for fill in (0, 7):
        base = batch(labels)
        base["input_ids"] = torch.where(base["attention_mask"] == 1, base["input_ids"], fill)
        losses.append(DIITO(student, teacher, form="task", cosine_weight=1.0, seed=1)(base))
    torch.testing.assert_close(*losses)


def test_another_architecture_and_autocast() -> None:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig
    small = {"vocab_size": 53, "dim": 16, "n_heads": 2, "hidden_dim": 32, "dropout": 0.0}
    teacher, student = (
        transformers.DistilBertForMaskedLM(config(n_layers=n, **small)) for n in (4, 2)
    )
    exact = DIITO(student, teacher, seed=1)(batch(TOKEN_LABELS), batch(seed=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = DIITO(student, teacher, seed=1)(batch(TOKEN_LABELS), batch(seed=2))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.0)
    loss.backward()
    assert student.distilbert.transformer.layer[0].ffn.lin1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "mlm"}, "form must be one of masked_lm, task, got 'mlm'"),
        ({"positions": "some"}, "positions must be one of consecutive, random, masked, got 'some'"),
        ({"index_mode": "x"}, "index_mode must be one of aligned, release, got 'x'"),
        ({"cf_weight": -1.0}, "cf_weight must be .*, got -1.0"),
        ({"alignment": "best"}, "name must be one of single_middle, .*, got 'best'"),
        ({"alignment": Alignment.named("multilayer", 12, 3)}, "for 6 and 3 layers .* 12 and 3"),
        ({"form": "masked_lm"}, "student must have a linear head over the vocabulary"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    teacher, student = models()
    with pytest.raises(ValueError, match=message):
        DIITO(student, teacher, **{"form": "task", **options})


def test_refusals_of_models_and_batches() -> None:
    teacher, student = models()
    with pytest.raises(ValueError, match="cosine_weight must be 0 for models of different widths"):
        DIITO(models(hidden_size=32)[1], teacher, form="task", cosine_weight=1.0)
    with pytest.raises(ValueError, match="student must have one list of config.num_hidden_layers"):
        DIITO(nn.Linear(2, 2), teacher, form="task")
    with pytest.raises(ValueError, match=r"labels must be \[batch, seq\] with positions='masked'"):
        DIITO(student, teacher, form="task", positions="masked")(batch(TASK_LABELS))
    with pytest.raises(ValueError, match="batch must have input_ids, got labels"):
        DIITO(student, teacher, form="task")({"labels": TASK_LABELS})
    with pytest.raises(ValueError, match="lengths must be .*CPU|source_lengths must have a row"):
        DIITO(student, teacher, form="task")(
            {**batch(TASK_LABELS), "lengths": LENGTHS}, {**batch(), "lengths": LENGTHS[:2]}
        )
    assert isinstance(kdkernels.sample_positions(LENGTHS, LENGTHS), Positions)
