"""Meta-KD: its terms against eager PyTorch, and what the released code slips on."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import MetaKD, MetaTeacher, expertise_weights, prototype_scores

transformers = pytest.importorskip("transformers")

CLS, SEP, PAD = 1, 2, 0
SPECIAL = (CLS, SEP)
LENGTHS = torch.tensor([9, 5, 7, 3])
LABELS = torch.tensor([0, 2, 1, 0])
SCORES = torch.tensor([0.9, -0.2, 0.4, 0.1], dtype=torch.float64)
DOMAINS = torch.tensor([0, 1, 2, 1])


def classifier(layers: int, width: int = 16, heads: int = 4, dropout: float = 0.0) -> Any:
    config = transformers.BertConfig(
        vocab_size=53,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        # Weights of a trained size: differences that a term of the wrong kind would not hide.
        initializer_range=0.3,
    )
    config._attn_implementation = "eager"
    return transformers.BertForSequenceClassification(config).double()


def models(width: int = 16, heads: int = 4, **options: Any) -> tuple[MetaTeacher, Any]:
    """A teacher of four layers and a student of two."""
    torch.manual_seed(0)
    model = classifier(4)
    teacher = MetaTeacher(model, 3, special_ids=SPECIAL, dropout=0.0, **options)
    return teacher, classifier(2, width, heads)


def batch() -> dict[str, Tensor]:
    """Texts between CLS and SEP, padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 53, (4, 9), generator=generator)
    places = torch.arange(9)
    ids = torch.where(places < LENGTHS[:, None], ids, PAD)
    ids[:, 0] = CLS
    ids[torch.arange(4), LENGTHS - 1] = SEP
    return {
        "input_ids": ids,
        "attention_mask": (places < LENGTHS[:, None]).long(),
        "labels": LABELS,
    }


# ---- eager PyTorch -------------------------------------------------------------------------------


def run(model: Any, given: dict[str, Tensor]) -> Any:
    inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
    return model(**inputs, output_hidden_states=True, output_attentions=True)


def scores_of(model: Any, output: Any, layer: int) -> Tensor:
    """Attention scores of a layer before the softmax, made as a map."""
    attention = model.bert.encoder.layer[layer - 1].attention.self
    states, heads = output.hidden_states[layer - 1], model.config.num_attention_heads
    q, k = (
        project(states).unflatten(-1, (heads, -1)).transpose(1, 2)
        for project in (attention.query, attention.key)
    )
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def eager(meta: MetaKD, teacher: MetaTeacher, student: Any, code: bool) -> dict[str, Tensor]:
    """Every term of every example, ``[batch]``, and the examples' weights."""
    given = batch()
    with torch.no_grad():
        taught = run(teacher.model, given)
    learnt = run(student, given)
    mask = given["attention_mask"].bool()
    special = (given["input_ids"] == CLS) | (given["input_ids"] == SEP)
    content = mask & ~special
    if code:
        mask, content = torch.ones_like(mask), torch.ones_like(mask)
        content[:, 0] = False
    fit = meta.projections[0] or torch.nn.Identity()
    transfer = meta.transfer or torch.nn.Identity()
    assert meta.knowledge is not None
    found: dict[str, list[Tensor]] = {}
    for row in range(4):
        keep = mask[row]
        states = [
            F.mse_loss(fit(learnt.hidden_states[s][row][keep]), taught.hidden_states[t][row][keep])
            for s, t in ((0, 0), (1, 2), (2, 4))
        ]
        maps = []
        for s, t in ((1, 2), (2, 4)):
            if code:
                own, other = learnt.attentions[s - 1][row], taught.attentions[t - 1][row]
            else:
                own = scores_of(student, learnt, s)[row][:, keep][:, :, keep]
                other = scores_of(teacher.model, taught, t)[row][:, keep][:, :, keep]
            step = other.shape[0] // own.shape[0]  # student head h learns from head h * step
            maps.append(F.mse_loss(own, other[::step]))
        known = []
        for head, output in ((meta.knowledge, learnt), (teacher.knowledge, taught)):
            mean = output.hidden_states[-1][row][content[row]].mean(0)
            known.append(head.linear(head.embedding.weight[DOMAINS[row]] + mean))
            if not code:
                known[-1] = known[-1].tanh()
        log_student = F.log_softmax(learnt.logits[row] / 2, -1)
        target = F.softmax(taught.logits[row] / 2, -1)
        soft = (
            -(target * log_student).sum()
            if code
            else 4 * F.kl_div(log_student, target, reduction="sum")
        )
        right = F.softmax(taught.logits[row], -1)[LABELS[row]]
        terms = {
            "embedding": states[0],
            "hidden": states[1] + states[2],
            "attention": maps[0] + maps[1],
            "transferable": F.mse_loss(transfer(known[0]), known[1].detach()),
            "prediction": soft,
            "weights": (1 + SCORES[row]) / (torch.exp((1 - right) ** 2) + 1),
        }
        for key, value in terms.items():
            found.setdefault(key, []).append(value)
    return {key: torch.stack(values) for key, values in found.items()}


STAGES = {
    (2, 0): ("embedding", "hidden", "attention", "transferable"),
    (2, 1): ("prediction",),
    (1, 0): ("embedding", "hidden", "attention", "transferable", "prediction"),
}


def trained(meta: MetaKD, student: Any) -> list[Tensor]:
    return [*student.parameters(), *meta.parameters()]


def gradients(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("stages", STAGES, ids=str)
@pytest.mark.parametrize(("width", "heads"), [(16, 4), (8, 2)])
def test_terms_and_gradients_are_those_of_eager_code(
    width: int, heads: int, stages: tuple[int, int]
) -> None:
    teacher, student = models(width, heads)
    meta = MetaKD(student, teacher, stages=stages[0], gamma2=0.3, hidden_weight=0.7)
    parts = meta(batch(), DOMAINS, SCORES, stage=stages[1], return_parts=True)
    expected = eager(meta, teacher, student, code=False)
    factors = {"transferable": 0.3, "hidden": 0.7}
    loss = torch.zeros((), dtype=torch.float64)
    for name in STAGES[stages]:
        term = (expected["weights"] * expected[name]).mean()
        close(getattr(parts, name), term.detach())
        loss = loss + factors.get(name, 1.0) * term
    for name in set(STAGES[1, 0]) - set(STAGES[stages]):
        assert getattr(parts, name) is None
    close(parts.weights, expected["weights"].detach())
    close(parts.loss, loss)
    weights = trained(meta, student)
    for found, wanted in zip(gradients(parts.loss, weights), gradients(loss, weights), strict=True):
        close(found, wanted)


@pytest.mark.parametrize(("width", "heads"), [(16, 4), (8, 2)])
@pytest.mark.parametrize("stage", [0, 1])
def test_code_is_what_was_released(width: int, heads: int, stage: int) -> None:
    teacher, student = models(width, heads)
    meta = MetaKD(student, teacher, faithful_to="code")
    parts = meta(batch(), DOMAINS, SCORES, stage=stage, return_parts=True)
    expected = eager(meta, teacher, student, code=True)
    if stage == 1:
        loss = expected["prediction"].mean()  # no weights, no T^2
    else:
        factors = {"transferable": 0.5}
        whole = [factors.get(n, 1.0) * expected[n].mean() for n in STAGES[2, 0]]
        loss = expected["weights"].mean() * torch.stack(whole).sum()
    close(parts.loss, loss)
    weights = trained(meta, student)
    for found, wanted in zip(gradients(parts.loss, weights), gradients(loss, weights), strict=True):
        close(found, wanted)


def test_weights_of_one_are_tinybert() -> None:
    teacher, student = models()
    plain = MetaKD(student, teacher.model, weighted=False, gamma2=0.0)
    assert list(plain.parameters()) == []
    unlabelled = {key: value for key, value in batch().items() if key != "labels"}
    meta = MetaKD(student, teacher)
    expected = eager(meta, teacher, student, code=False)
    for stage in (0, 1):
        names = [name for name in STAGES[2, stage] if name != "transferable"]
        parts = plain(unlabelled, stage=stage, return_parts=True)
        close(parts.loss, torch.stack([expected[name].mean() for name in names]).sum())
        assert parts.weights is None


# ---- the slips of the released code (methods.md, c.6) --------------------------------------------


def embedding_gradients(faithful_to: str, scores: Tensor, stage: int = 0) -> Tensor:
    """Gradients at the student's embedding output, ``[batch, seq, width]``."""
    teacher, student = models()
    meta = MetaKD(student, teacher, faithful_to=faithful_to)
    seen: list[Tensor] = []
    student.bert.embeddings.register_forward_hook(lambda *args: seen.append(args[2]))
    loss = meta(batch(), DOMAINS, scores, stage=stage)
    return torch.autograd.grad(loss, seen[0])[0]


@pytest.mark.parametrize("stage", [0, 1])
def test_slip_1_a_weight_changes_its_example_only(stage: int) -> None:
    other = SCORES.clone()
    other[2] = -0.5
    before, after = (embedding_gradients("paper", scores, stage) for scores in (SCORES, other))
    rest = [0, 1, 3]
    assert torch.equal(before[rest], after[rest])
    close(after[2], before[2] * (1 - 0.5) / (1 + 0.4))
    if stage == 0:  # as released the weight of one example is a part of everyone's
        before, after = (embedding_gradients("code", scores) for scores in (SCORES, other))
        assert all(not torch.equal(before[row], after[row]) for row in range(4))


def test_slip_2_padding_and_special_tokens_are_no_content() -> None:
    given = batch()
    teacher, student = models()
    mask = teacher.content_mask(given)
    assert mask.sum(1).tolist() == (LENGTHS - 2).tolist()
    assert not mask[:, 0].any() and not (mask & (given["attention_mask"] == 0)).any()
    own = {**given, "special_tokens_mask": torch.zeros_like(given["input_ids"])}
    assert teacher.content_mask(own).sum(1).tolist() == LENGTHS.tolist()
    padded = {key: value for key, value in given.items() if key != "input_ids"}
    padded["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, 33)
    for faithful_to, same in (("paper", True), ("code", False)):
        meta = MetaKD(student, teacher, stages=1, faithful_to=faithful_to)
        found = [meta(g, DOMAINS, SCORES).item() for g in (given, padded)]
        assert (found[0] == pytest.approx(found[1], rel=1e-12)) == same
        single = copy.deepcopy(teacher)
        single.faithful_to = faithful_to
        losses = []
        for g in (given, padded):
            single.load_state_dict(teacher.state_dict())
            losses.append(single(g, DOMAINS, SCORES).item())
        assert (losses[0] == pytest.approx(losses[1], rel=1e-12)) == same


def test_slip_2_a_text_without_content_has_no_gradient_but_a_loss() -> None:
    teacher, student = models()
    given = {key: value[:, :2] if value.dim() == 2 else value for key, value in batch().items()}
    given["input_ids"] = torch.tensor([[CLS, SEP]] * 4)
    loss = MetaKD(student, teacher)(given, DOMAINS, SCORES)
    loss.backward()
    assert loss.isfinite() and all(
        p.grad.isfinite().all() for p in student.bert.encoder.parameters() if p.grad is not None
    )


def test_slip_3_the_target_is_the_teachers_own_trained_projection(tmp_path: Path) -> None:
    teacher, student = models()
    teacher(batch(), DOMAINS, SCORES).backward()
    for weight in teacher.parameters():
        if weight.grad is not None:
            weight.data -= 0.1 * weight.grad
    teacher.save_head(tmp_path)
    again = MetaTeacher(copy.deepcopy(teacher.model), 3, special_ids=SPECIAL, seed=5)
    options = {"stage": 0, "return_parts": True}
    meta = MetaKD(student, teacher)
    fresh = MetaKD(student, again)
    fresh.load_state_dict(meta.state_dict())
    found = [m(batch(), DOMAINS, SCORES, **options).transferable for m in (meta, fresh)]
    assert found[0] != found[1]  # a head that is not the trained one teaches something else
    again.load_head(tmp_path)
    close(fresh(batch(), DOMAINS, SCORES, **options).transferable, found[0])
    with pytest.raises(ValueError, match=r"folder must hold a domain_head.safetensors"):
        again.load_head(tmp_path / "none")
    with pytest.raises(ValueError, match="folder must hold a domain_head.safetensors of 4 domains"):
        MetaTeacher(teacher.model, 4, special_ids=SPECIAL).load_head(tmp_path)


def test_slip_4_the_teacher_is_in_eval_mode_whatever_its_mode() -> None:
    torch.manual_seed(0)
    teacher = MetaTeacher(classifier(4, dropout=0.5), 3, special_ids=SPECIAL).train()
    teacher.model.bert.encoder.layer[1].eval()
    student = classifier(2)
    meta = MetaKD(student, teacher, stages=1)
    first, second = (meta(batch(), DOMAINS, SCORES) for _ in range(2))
    assert torch.equal(first, second)
    assert teacher.training and teacher.model.training
    assert not teacher.model.bert.encoder.layer[1].training
    first.backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    assert not {id(p) for p in meta.parameters()} & {id(p) for p in teacher.parameters()}


def test_slip_5_attention_is_compared_before_softmax_and_dropout() -> None:
    teacher, _ = models()
    student = classifier(2)
    for layer in student.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    meta = MetaKD(student.train(), teacher, layers=[(1, 2)])
    parts = [meta(batch(), 0, SCORES, return_parts=True) for _ in range(2)]
    # Nothing is dropped before the first layer's scores, but its output differs.
    assert parts[0].attention == parts[1].attention and parts[0].hidden != parts[1].hidden
    # A softmax cannot see what all scores of a query have in common.
    before = parts[0].attention
    with torch.no_grad():
        student.bert.encoder.layer[0].attention.self.key.bias += 1.0
    assert not torch.isclose(meta(batch(), 0, SCORES, return_parts=True).attention, before)


def test_slip_6_the_prediction_stage_has_the_weights_too() -> None:
    teacher, student = models()
    for faithful_to, same in (("paper", False), ("code", True)):
        meta = MetaKD(student, teacher, faithful_to=faithful_to)
        found = [meta(batch(), DOMAINS, s, stage=1) for s in (SCORES, SCORES.flip(0))]
        assert torch.equal(*found) == same


def test_slip_8_a_teacher_of_one_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="domains must be 2 or more, got 1"):
        MetaTeacher(classifier(2), 1, special_ids=SPECIAL)
    # Scores of one domain have no other to look at, and are no NaN; weights of them neither.
    means, one = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    for form, prototype in (("paper", means.mean(0)[None, None]), ("code", means.mean(0)[None])):
        scores = prototype_scores(means, prototype, one, one, form=form)
        assert scores.isfinite().all()
        assert expertise_weights(torch.randn(4, 3), LABELS, scores).isfinite().all()


# ---- the teacher ---------------------------------------------------------------------------------


def test_the_teachers_loss_is_that_of_eager_code() -> None:
    teacher, _ = models(gamma1=0.7)
    state = teacher.get_extra_state()
    parts = teacher(batch(), DOMAINS, SCORES, return_parts=True)
    order = torch.randperm(4, generator=torch.Generator().set_state(state))
    output = run(teacher.model, batch())
    content = teacher.content_mask(batch())
    rows = []
    for row in range(4):
        mean = output.hidden_states[-1][row][content[row]].mean(0)
        head = teacher.knowledge
        known = head.linear(head.embedding.weight[DOMAINS[row]] + mean).tanh()
        ce = F.cross_entropy(output.logits[row], LABELS[row])
        rows.append((ce, F.cross_entropy(teacher.corruption(known), DOMAINS[order[row]])))
    ce, corruption = (torch.stack(each) for each in zip(*rows, strict=True))
    close(parts.ce, (SCORES * ce).mean().detach())
    close(parts.corruption, (SCORES * corruption).mean().detach())
    loss = (SCORES * (ce + 0.7 * corruption)).mean()
    weights = list(teacher.parameters())
    for found, wanted in zip(gradients(parts.loss, weights), gradients(loss, weights), strict=True):
        close(found, wanted)


def test_a_batch_of_one_domain_has_no_corruption_and_is_told_of_once() -> None:
    alone = torch.tensor([1, 1, 1, 1])
    for faithful_to, what in (("paper", "is left out"), ("code", "teaches the domain")):
        teacher, _ = models(faithful_to=faithful_to)
        with pytest.warns(UserWarning, match=f"domains must be several in a batch.*{what}"):
            parts = teacher(batch(), alone, return_parts=True)
        assert (parts.corruption == 0) == (faithful_to == "paper")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            teacher(batch(), alone)
            teacher(batch(), DOMAINS)
            one = {key: value[:1] for key, value in batch().items()}
            models()[0](one, alone[:1])  # the last batch of an epoch may be of one example


def test_a_resumed_teacher_draws_what_an_unbroken_one_does() -> None:
    teacher, _ = models(seed=3)
    teacher(batch(), DOMAINS)
    state = copy.deepcopy(teacher.state_dict())
    expected = [teacher(batch(), DOMAINS).item() for _ in range(4)]
    again, _ = models(seed=4)
    again.load_state_dict(state)
    assert [again(batch(), DOMAINS).item() for _ in range(4)] == expected
    assert len(set(expected)) > 1


def test_an_unknown_domain_has_the_mean_of_the_others() -> None:
    teacher, _ = models()
    content, head = torch.randn(1, 16, dtype=torch.float64), teacher.knowledge
    found = head(content, torch.tensor([-1]))
    close(found, head.linear(content + head.embedding.weight.mean(0)).tanh())


# ---- weights, state, refusals --------------------------------------------------------------------


def test_expertise_weights() -> None:
    logits = torch.tensor([[60.0, -60.0], [60.0, -60.0], [0.0, 0.0]])
    found = expertise_weights(logits, torch.tensor([0, 1, 1]), torch.tensor([0.0, 0.0, 1.0]))
    expected = [1 / 2, 1 / (math.e + 1), 2 / (math.exp(0.25) + 1)]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not expertise_weights(logits.requires_grad_(), torch.tensor([0, 1, 1])).requires_grad


def test_state_of_what_is_trained_beside_the_student() -> None:
    teacher, student = models(8, 2)
    meta = MetaKD(student, teacher)
    other = MetaKD(student, teacher, seed=1)
    names = {name.split(".")[0] for name in meta.state_dict()}
    assert names == {"projections", "knowledge", "transfer"}
    assert set(dict(meta.named_parameters())) == set(meta.state_dict())
    loss = meta(batch(), DOMAINS, SCORES)
    assert other(batch(), DOMAINS, SCORES) != loss
    other.load_state_dict(meta.state_dict())
    assert torch.equal(other(batch(), DOMAINS, SCORES), loss)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in meta.parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_the_student_of_the_teachers_width_begins_with_its_knowledge() -> None:
    teacher, student = models()
    meta = MetaKD(student, teacher)
    assert meta.knowledge is not None and meta.transfer is None
    assert torch.equal(meta.knowledge.linear.weight, teacher.knowledge.linear.weight)
    assert meta.knowledge.linear.weight is not teacher.knowledge.linear.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3}, "stages must be 1 or 2, got 3"),
        ({"gamma2": -1.0}, "gamma2 must be finite and 0 or more, got -1.0"),
        ({"hidden_weight": "x"}, "hidden_weight must be a number, got str"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"faithful_to": "me"}, "faithful_to must be one of paper, code, got 'me'"),
        ({"layers": "top"}, "rule must be one of"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    teacher, student = models()
    with pytest.raises((ValueError, TypeError), match=message):
        MetaKD(student, teacher, **options)


def test_refused_batches() -> None:
    teacher, student = models()
    meta, given = MetaKD(student, teacher), batch()
    with pytest.raises(ValueError, match="stage must be below 2, got 2"):
        meta(given, 0, stage=2)
    with pytest.raises(ValueError, match="domains must be given unless gamma2 is 0"):
        meta(given, scores=SCORES)
    with pytest.raises(ValueError, match=r"domains must lie in \[-1, 3\), got 3 to 3"):
        meta(given, 3)
    with pytest.raises(ValueError, match=r"domains must be \[4\]"):
        meta(given, DOMAINS[:2])
    with pytest.raises(ValueError, match="batch must have labels"):
        meta({key: given[key] for key in ("input_ids", "attention_mask")}, 0)
    with pytest.raises(ValueError, match="scores must be -1 or more, got -2"):
        meta(given, 0, torch.full((4,), -2.0))
    with pytest.raises(ValueError, match=r"scores must be \[4\]"):
        meta(given, 0, torch.ones(3))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got -100"):
        meta({**given, "labels": torch.tensor([0, -100, 1, 2])}, 0)
    with pytest.raises(ValueError, match="weights must leave a term of stage 1"):
        MetaKD(student, teacher, prediction_weight=0.0)(given, stage=1)
    with pytest.raises(TypeError, match="teacher must be a MetaTeacher unless gamma2 is 0"):
        MetaKD(student, teacher.model)
    with pytest.raises(ValueError, match=r"domains must lie in \[0, 3\), got -1 to 1"):
        teacher(given, torch.tensor([-1, 0, 1, 1]))
    with pytest.raises(ValueError, match="scores must be finite"):
        teacher(given, DOMAINS, torch.full((4,), math.nan))
    with pytest.raises(ValueError, match="batch must have special_tokens_mask"):
        MetaTeacher(teacher.model, 3)(given, DOMAINS)


def test_examples_of_the_docstrings() -> None:
    for name in ("expertise", "meta_kd", "meta_teacher"):
        found = doctest.testmod(importlib.import_module(f"kdkernels.api.methods.{name}"))
        assert found.attempted and not found.failed
