"""Sparse teachers: scores against explicit gates, cut models against gated ones."""

from __future__ import annotations

import doctest
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels
from kdkernels import SparseTeacher, TeacherScores
from kdkernels.api.methods import stark
from kdkernels.api.methods.structure import layers_of
from kdkernels.api.methods.teacher_scores import _own, _students
from kdkernels.bench.cases import Setting
from kdkernels.bench.measure import check
from kdkernels.bench.steps.stark_score_pass import CASE

transformers = pytest.importorskip("transformers")

# Of each: list of layers, projection of the heads' context and of the neurons.
PLACES = {
    "Bert": ("bert.encoder.layer", "attention.output.dense", "output.dense"),
    "Roberta": ("roberta.encoder.layer", "attention.output.dense", "output.dense"),
    "DistilBert": ("distilbert.transformer.layer", "attention.out_lin", "ffn.lin2"),
    "GPT2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "Llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
}
ARCHITECTURES = list(PLACES)
HEADS, WIDTH, NEURONS, LAYERS, VOCAB = 4, 16, 24, 3, 31
T = 2.0


def made(architecture: str, classes: int = 3, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_labels": classes,
        "pad_token_id": 0,
    }
    key = {"DistilBert": "hidden_dim", "GPT2": "n_inner"}.get(architecture, "intermediate_size")
    sizes |= {key: NEURONS, **({"num_key_value_heads": 2} if architecture == "Llama" else {})}
    config = getattr(transformers, f"{architecture}Config")(**{**sizes, **more})
    model = getattr(transformers, f"{architecture}ForSequenceClassification")(config)
    for name, parameter in model.named_parameters():
        # Drawn as usual, logits would hardly depend on single units; biases would be 0.
        if "embeddings" not in name and "norm" not in name.lower():
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def batches(classes: int = 3, count: int = 2) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).long()
        labels = torch.randint(max(classes, 2), (3,), generator=generator)
        found.append(
            {
                "input_ids": torch.randint(1, VOCAB, (3, 7), generator=generator) * mask,
                "attention_mask": mask,
                "labels": labels if classes > 1 else labels.double() - 0.3,
            }
        )
    return found


def units(architecture: str) -> int:
    return 2 if architecture == "Llama" else HEADS


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    given = {key: x for key, x in batch.items() if key != "labels"}
    return model(**given).logits  # type: ignore[no-any-return]


@contextmanager
def gated(model: Any, architecture: str, gates: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Multiplies explicit gates in; places are named here, not found."""
    path, *names = PLACES[architecture]

    def multiply(gate: Tensor, module: nn.Module, args: Any) -> Any:
        return (args[0] * gate.repeat_interleave(args[0].shape[-1] // len(gate)),)

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(partial(multiply, gate))
        for layer, pair in zip(model.get_submodule(path), gates, strict=True)
        for name, gate in zip(names, pair, strict=True)
    ]
    yield
    for handle in handles:
        handle.remove()


def ones(architecture: str) -> list[tuple[Tensor, Tensor]]:
    made = torch.ones, units(architecture), NEURONS
    return [tuple(made[0](n, dtype=torch.float64) for n in made[1:]) for _ in range(LAYERS)]  # type: ignore[misc]


def losses(teacher: Tensor, student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example: the teacher's own, and the published distillation loss."""
    if teacher.shape[1] == 1:
        y = labels[:, None]
        parts = [
            (a - b).square()[:, 0] for a, b in ((teacher, y), (student, teacher), (student, y))
        ]
        return parts[0], 0.5 * (parts[1] + parts[2])
    own = F.cross_entropy(teacher, labels, reduction="none")
    soft = -((teacher / T).softmax(-1) * (student / T).log_softmax(-1)).sum(-1)
    return own, 0.5 * (T * T * soft + F.cross_entropy(student, labels, reduction="none"))


def explicit_scores(
    model: Any, student: Any, architecture: str, data: list[dict[str, Tensor]], per: str
) -> list[list[Tensor]]:
    """Absolute gradients of both losses at explicit gates, in the order of the gates."""
    gates = ones(architecture)
    leaves = [gate.requires_grad_() for pair in gates for gate in pair]
    sums = [[torch.zeros_like(gate) for gate in leaves] for _ in range(2)]
    for batch in data:
        with gated(model, architecture, gates):
            teacher = logits(model, batch)
        with torch.no_grad():
            taught = logits(student, batch)
        for total, loss in zip(sums, losses(teacher, taught, batch["labels"]), strict=True):
            for one in [loss.mean()] if per == "batch" else list(loss):
                for into, grad in zip(
                    total, torch.autograd.grad(one, leaves, retain_graph=True), strict=True
                ):
                    into += grad.abs()
    return sums


@pytest.mark.parametrize(
    ("architecture", "classes", "per"),
    [
        *((name, 3, "batch") for name in ARCHITECTURES),
        ("Bert", 1, "batch"),
        ("Bert", 2, "batch"),
        ("Bert", 3, "example"),
        ("GPT2", 2, "example"),  # one pass back; Llama would round, its norms are in float32
    ],
)
def test_scores_are_gradients_of_gates(architecture: str, classes: int, per: str) -> None:
    model = made(architecture, classes)
    student = made("Bert", classes, seed=1, num_hidden_layers=1)
    data = batches(classes)
    found = SparseTeacher.score(model, data, student=student, per=per, temperature=T)
    right = explicit_scores(model, student, architecture, data, per)
    for units, wanted in zip((found.expressiveness, found.friendliness), right, strict=True):
        assert units is not None
        scores = [s for pair in zip(units["heads"], units["neurons"], strict=True) for s in pair]
        for mine, theirs in zip(scores, wanted, strict=True):
            assert theirs.max() > 1e-6
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-9, atol=1e-13)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_student_that_trains_goes_on_and_is_scored_without_dropout() -> None:
    model, student = made("Bert"), made("Bert", seed=1, num_hidden_layers=1).train()
    student.bert.requires_grad_(False)
    student.dropout.eval()
    found = [SparseTeacher.score(model, batches(), student=student) for _ in range(2)]
    assert torch.equal(found[0].combined["neurons"][0], found[1].combined["neurons"][0])
    assert student.training and not student.dropout.training and student.bert.training
    assert student.classifier.weight.requires_grad
    assert not any(p.requires_grad for p in student.bert.parameters())


def scores_of(model: Any, architecture: str, seed: int = 3) -> TeacherScores:
    """Any scores; those of a layer's units lie apart from another's, so that widths differ."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> list[Tensor]:
        return [torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(LAYERS)]

    return TeacherScores({"heads": drawn(units(architecture)), "neurons": drawn(NEURONS)}, lam=1.0)


@pytest.mark.parametrize(("narrow", "tokens"), [(True, 128), (True, 129), (False, 128)])
def test_short_texts_in_16_bits_are_read_without_the_flash_kernel(
    narrow: bool, tokens: int
) -> None:
    """Its backward pass is slow on a CPU; the student, which has none, keeps it."""
    teacher, student = (made("Bert", seed=seed).float() for seed in (0, 1))
    flash: list[bool] = []
    for model in (teacher, student):
        model.register_forward_pre_hook(
            lambda *_: flash.append(torch.backends.cuda.flash_sdp_enabled())
        )
    batch = {"input_ids": torch.randint(VOCAB, (2, tokens)), "labels": torch.tensor([0, 2])}
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        found = SparseTeacher.score(teacher, [batch], student=student)
    assert flash == [not (narrow and tokens == 128), True]
    exact = SparseTeacher.score(teacher.double(), [batch], student=student.double())
    for kind in ("heads", "neurons"):
        mine, wide = (torch.cat(list(x.expressiveness[kind])) for x in (found, exact))
        assert F.cosine_similarity(mine, wide, dim=0) > 0.99


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_order_of_units_changes_nothing(architecture: str) -> None:
    model, batch = made(architecture), batches()[0]
    dense = logits(model, batch)
    for layer in layers_of("test", model):
        layer.narrow(torch.randperm(layer.units[0]), torch.randperm(layer.units[1]))
    torch.testing.assert_close(logits(model, batch), dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_cut_is_gated_to_zero(architecture: str) -> None:
    """At several levels, up and down, also with layers that have lost everything of a kind."""
    model, batch = made(architecture), batches()[0]
    dense, full = logits(model, batch), made(architecture)
    scores = scores_of(model, architecture)
    # So low that they stay low when divided by the layer's norm and 1e-7.
    scores.expressiveness["heads"][0].mul_(1e-12)
    scores.expressiveness["neurons"][1].mul_(1e-12)
    sparse = SparseTeacher(model, scores)
    parameters = sum(p.numel() for p in model.parameters())
    for level in (0.4, 0.9, 0.15):
        sparse.sparsify(level)
        assert sparse.level == level
        removed = round(level * units(architecture) * LAYERS)
        assert sum(heads for heads, _ in sparse.widths) == units(architecture) * LAYERS - removed
        assert all(neurons % 8 == 0 for _, neurons in sparse.widths)
        expected = expected_logits(full, architecture, scores, sparse.widths, batch)
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-9, atol=1e-11)
        assert sum(p.numel() for p in model.parameters()) < parameters
        if level == 0.4:
            assert sparse.widths[0][0] == 0 and sparse.widths[1][1] == 0
            mid = [x.clone() for x in model.state_dict().values()]
    sparse.sparsify(0.0)
    assert torch.equal(logits(model, batch), dense)
    sparse.sparsify(0.4)
    assert all(map(torch.equal, mid, model.state_dict().values()))
    again = logits(model, batch)
    sparse.densify()
    assert torch.equal(logits(model, batch), again) and sparse.level == 0.4
    with pytest.raises(RuntimeError, match="sparsify must be called before densify"):
        sparse.sparsify(0.1)


def expected_logits(
    full: Any,
    architecture: str,
    scores: TeacherScores,
    widths: list[tuple[int, int]],
    batch: dict[str, Tensor],
) -> Tensor:
    """The dense model with gates of 0, and without output biases where nothing is left."""
    gates, path, biases = ones(architecture), PLACES[architecture][0], []
    for i, layer in enumerate(full.get_submodule(path)):
        for kind, gate, count, name in zip(
            ("heads", "neurons"), gates[i], widths[i], PLACES[architecture][1:], strict=True
        ):
            ranking = scores.expressiveness[kind][i].argsort(descending=True)
            gate[ranking[count:]] = 0.0
            bias = layer.get_submodule(name).bias
            if count == 0 and bias is not None:
                biases.append((bias, bias.detach().clone()))
                bias.data.zero_()
    with gated(full, architecture, gates):
        found = logits(full, batch)
    for bias, old in biases:
        bias.data.copy_(old)
    return found


def test_the_lowest_of_all_layers_go_and_a_level_is_the_beginning_of_a_lower_one() -> None:
    model = made("Bert")
    ramp = [torch.arange(NEURONS).double() + NEURONS * i for i in range(LAYERS)]
    heads = [torch.arange(HEADS).double() + HEADS * i for i in range(LAYERS)]
    sparse = SparseTeacher(model, TeacherScores({"heads": heads, "neurons": ramp}, lam=1.0))
    weights = {}
    for level in (0.25, 0.5, 1.0):
        sparse.sparsify(level)
        weights[level] = [layer.intermediate for layer in model.bert.encoder.layer]
        if level < 1.0:
            weights[level] = [layer.output.dense.weight for layer in model.bert.encoder.layer]
    sparse.sparsify(0.5)
    # Normalised by layer, so the highest of each are near each other.
    assert sum(n for _, n in sparse.widths) == pytest.approx(NEURONS * LAYERS / 2, abs=8)
    for low, high in zip(weights[0.25], weights[0.5], strict=True):
        assert torch.equal(low[:, : high.shape[1]], high)
    sparse.sparsify(1.0)
    assert sparse.widths == [(0, 0)] * LAYERS and logits(model, batches()[0]).isfinite().all()


def test_lambda_one_ranks_as_the_teacher_alone() -> None:
    model, student = made("DistilBert"), made("Bert", seed=1)
    both = SparseTeacher.score(model, batches(), student=student)
    alone = SparseTeacher.score(model, batches(), lam=1.0)
    assert alone.friendliness is None and both.lam == 0.5
    for kind in ("heads", "neurons"):
        for a, b in zip(both.at(1.0).combined[kind], alone.combined[kind], strict=True):
            assert torch.equal(a.argsort(), b.argsort())
    e, f = (torch.stack(u["neurons"]) for u in (both.expressiveness, both.friendliness))  # type: ignore[index]
    right = 0.5 * (e / e.norm(dim=1, keepdim=True) + f / f.norm(dim=1, keepdim=True))
    torch.testing.assert_close(torch.stack(both.combined["neurons"]), right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [1, 4])
def test_gradients_at_the_logits_have_a_closed_form(classes: int) -> None:
    teacher = torch.randn(5, classes, dtype=torch.float64, requires_grad=True)
    student = torch.randn(5, classes, dtype=torch.float64)
    labels = torch.arange(5) % classes if classes > 1 else torch.randn(5).double()
    own, kd = losses(teacher, student, labels)
    for loss, closed in ((own, _own(teacher, labels)), (kd, _students(teacher, student, T))):
        (grad,) = torch.autograd.grad(loss.sum(), teacher)
        torch.testing.assert_close(closed.detach(), grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_models_load(architecture: str, tmp_path: Path) -> None:
    model, batch = made(architecture).float(), batches()[0]
    sparse = SparseTeacher(model, scores_of(model, architecture))
    sparse.sparsify(0.5)
    assert len(set(sparse.widths)) > 1 and not sparse.plain
    sparse.save_pretrained(tmp_path / "uneven")
    loaded = SparseTeacher.from_pretrained(tmp_path / "uneven")
    assert loaded.widths == sparse.widths and loaded.level == 0.5
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))
    with pytest.raises(OSError, match="no file named"):
        type(model).from_pretrained(tmp_path / "uneven")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        sparse.save_pretrained(tmp_path / "uneven")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_even_widths_are_plain_where_a_configuration_can_tell(
    architecture: str, tmp_path: Path
) -> None:
    model, batch = made(architecture).float(), batches()[0]
    # Every other unit, so each layer loses as many.
    drawn = [torch.arange(n).double() % 2 for n in (units(architecture), NEURONS)]
    scores = TeacherScores({"heads": [drawn[0]] * LAYERS, "neurons": [drawn[1]] * LAYERS}, lam=1.0)
    sparse = SparseTeacher(model, scores)
    sparse.sparsify(0.5)
    heads = units(architecture) // 2
    assert sparse.widths == [(heads, 16)] * LAYERS
    assert sparse.plain == (architecture == "Llama")
    if not sparse.plain:  # by neurons alone
        for layer in sparse._layers:
            layer.narrow(None, torch.arange(0, NEURONS, 3).repeat(2))
        assert sparse.plain
    sparse.save_pretrained(tmp_path / "even")
    loaded = type(model).from_pretrained(tmp_path / "even")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert SparseTeacher.from_pretrained(tmp_path / "even").widths == sparse.widths
    sparse.sparsify(0.0)
    assert sparse.plain


def test_a_cache_knows_its_length_without_the_first_attention() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=2, n_inner=16, vocab_size=VOCAB, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    heads = [torch.zeros(2), torch.ones(2)]
    scores = TeacherScores({"heads": heads, "neurons": [torch.ones(16)] * 2}, lam=1.0)
    sparse = SparseTeacher(model, scores)
    sparse.sparsify(0.5)
    assert [n for n, _ in sparse.widths] == [0, 2]
    ids = torch.tensor([[3, 5, 7]])
    with_cache, without = (
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=3, n_inner=24, vocab_size=VOCAB)
    model = transformers.GPT2LMHeadModel(config).eval().bfloat16()
    scores = scores_of(model, "GPT2")
    pairs = {"heads": [s[:2] for s in scores.expressiveness["heads"]]}
    scores = TeacherScores({**scores.expressiveness, **pairs}, lam=1.0)
    sparse = SparseTeacher(model, scores)
    sparse.sparsify(0.5)
    sparse.save_pretrained(tmp_path / "tied")
    loaded: Any = SparseTeacher.from_pretrained(tmp_path / "tied").model
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    ids = torch.tensor([[3, 5, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_scores_are_saved(tmp_path: Path) -> None:
    scores = SparseTeacher.score(made("GPT2"), batches(), student=made("Bert"), lam=0.25)
    scores.save(tmp_path / "scores.pt")
    loaded = TeacherScores.load(tmp_path / "scores.pt")
    assert loaded.lam == 0.25
    for kind, layers in scores.combined.items():
        assert all(map(torch.equal, layers, loaded.combined[kind]))
    torch.save({"lam": 1.0}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="path must hold saved scores, got .*other.pt"):
        TeacherScores.load(tmp_path / "other.pt")


def test_refusals(tmp_path: Path) -> None:
    model, data = made("Bert"), batches()
    score = partial(SparseTeacher.score, model)
    with pytest.raises(ValueError, match="student must be given with a lam of 0.5 below 1"):
        score(data)
    with pytest.raises(ValueError, match="lam must be in"):
        score(data, lam=2.0)
    with pytest.raises(ValueError, match="per must be one of batch, example, got 'token'"):
        score(data, lam=1.0, per="token")
    with pytest.raises(ValueError, match="loader must have at least one batch, got none"):
        score([], lam=1.0)
    with pytest.raises(ValueError, match="batches must have labels, got input_ids"):
        score([{"input_ids": data[0]["input_ids"]}], lam=1.0)
    with pytest.raises(TypeError, match="loader must give mappings .* got tuple"):
        score([(1, 2)], lam=1.0)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"teacher's logits \[3, 3\], got \[3, 4\]"):
        score(data, student=made("Bert", 4))
    with pytest.raises(ValueError, match="labels must be one of each of 3 examples"):
        score([{**data[0], "labels": data[0]["input_ids"]}], lam=1.0)
    assert all(p.requires_grad for p in model.parameters())  # also after an error
    with pytest.raises(ValueError, match="model must have one list of"):
        SparseTeacher(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="scores must be TeacherScores, got float"):
        SparseTeacher(model, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"numbers of heads \[4, 4, 4\], got \[2, 2, 2\]"):
        SparseTeacher(model, scores_of(model, "Llama"))
    with pytest.raises(ValueError, match="scores must be given to sparsify, got None"):
        SparseTeacher(model).sparsify(0.5)
    sparse = SparseTeacher(model, scores_of(model, "Bert"))
    with pytest.raises(ValueError, match=r"level must be in \[0, 1\], got 70"):
        sparse.sparsify(70)
    with pytest.raises(ValueError, match="scores of heads must be finite, got others in layer 0"):
        TeacherScores({"heads": [torch.tensor([float("nan")])], "neurons": []}, lam=1.0)
    with pytest.raises(ValueError, match="directory must hold sparse_teacher.json"):
        SparseTeacher.from_pretrained(tmp_path)
    model.bert.encoder.layer[1].output.dense = nn.Sequential(nn.Linear(NEURONS, WIDTH))
    with pytest.raises(
        ValueError, match="layer.1.output.dense must be a plain nn.Linear or Conv1D"
    ):
        SparseTeacher(model)
    model.bert.encoder.layer[0].output.dense = None
    with pytest.raises(ValueError, match="model must have layers as those of BERT, RoBERTa"):
        SparseTeacher(model)
    other = made("Llama")
    other.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="no parameters but those of its projections .* got sinks"):
        SparseTeacher(other)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = made("Bert").float()
    sparse = SparseTeacher(model, scores_of(model, "Bert"))
    sparse.sparsify(0.5)
    sparse.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "sparse_teacher.json"
    about = json.loads(file.read_text())
    about["widths"][0] = {"heads": 4, "neurons": 24}
    about["widths"][1] = {"heads": 4, "neurons": 8}
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must hold weights of the widths"):
        SparseTeacher.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("classes", CASE.divergences)
def test_the_benchmark_compares_like_with_like(classes: str) -> None:
    backend = kdkernels.available_backends("gate_scores")[0]
    setting = Setting("cpu", torch.float32, classes)
    for variant in (CASE.ours(setting, backend), CASE.rival(setting, "eager")):
        assert not isinstance(variant, str)
        for found in check(CASE, setting, (2, 16), variant):
            assert found.passed, found


def test_the_example_runs() -> None:
    found = doctest.testmod(stark)
    assert found.attempted and not found.failed
