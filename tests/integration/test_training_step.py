"""A whole training step with the losses, under everything that users wrap around one.

Both models and every loss are inside of one graph: the compiled step must equal the eager one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels

transformers = pytest.importorskip("transformers")

VOCAB, BATCH, TOKENS, HEADS = 61, 2, 7, 4
Losses = Callable[["Step", Any, Any, dict[str, Tensor]], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def make_model(layers: int, width: int, seed: int) -> nn.Module:
    """A masked language model without dropout."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        use_cache=False,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def make_batch(seed: int = 3) -> dict[str, Tensor]:
    """Two texts of different lengths, a third of the tokens to predict."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (BATCH, TOKENS), generator=source)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, 5:] = 0
    labels = ids.masked_fill(torch.rand(BATCH, TOKENS, generator=source) > 0.3, -100)
    labels[:, 1] = ids[:, 1]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


class Step(nn.Module):
    """The loss of a batch: teacher, student, and what the student learns by."""

    def __init__(self, losses: Losses, student: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student or make_model(layers=2, width=16, seed=0)
        self.teacher = make_model(layers=4, width=24, seed=1).eval().requires_grad_(False)
        self.projections = kdkernels.Projections([16, 16], [24, 24])
        self.losses = losses

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        student = self.student(**inputs, output_hidden_states=True)
        with torch.no_grad():
            teacher = self.teacher(**inputs, output_hidden_states=True)
        return self.losses(self, student, teacher, batch)


def logits_loss(step: Step, student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    return kdkernels.kd_loss(
        student.logits, teacher.logits, batch["labels"], temperature=2.0, alpha=0.5
    )


def linear_loss(step: Step, student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    heads = [model.cls.predictions for model in (step.student, step.teacher)]
    hidden = [
        head.transform(out.hidden_states[-1])
        for head, out in zip(heads, (student, teacher), strict=True)
    ]
    return kdkernels.linear_kd_loss(
        hidden[0],
        heads[0].decoder.weight,
        hidden[1],
        heads[1].decoder.weight,
        batch["labels"],
        student_bias=heads[0].decoder.bias,
        teacher_bias=heads[1].decoder.bias,
        temperature=2.0,
        alpha=0.5,
    )


def hidden_loss(step: Step, student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    pairs = kdkernels.LayerMap("uniform").hidden(student.hidden_states, teacher.hidden_states)
    return kdkernels.hidden_match_many(
        pairs, projections=list(step.projections), mask=batch["attention_mask"]
    )


def attention_loss(step: Step, student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the last layers, from the queries and keys that the models' own projections make."""
    queries_and_keys = []
    for model, out in ((step.student, student), (step.teacher, teacher)):
        attention = model.bert.encoder.layer[-1].attention.self
        state = out.hidden_states[-2]
        queries_and_keys.append(
            tuple(
                projection(state).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for projection in (attention.query, attention.key)
            )
        )
    return kdkernels.attention_match_loss(
        *queries_and_keys, kind="kl", mask=batch["attention_mask"]
    )


def every_loss(step: Step, student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    losses = (logits_loss, linear_loss, hidden_loss, attention_loss)
    return torch.stack([loss(step, student, teacher, batch) for loss in losses]).sum()


def compiled(step: Step) -> Callable[..., Tensor]:
    """The step as one graph.

    transformers installs what records hidden states at a model's first call, under a lock, which
    no graph can hold: so the first call is eager.
    """
    with torch.no_grad():
        step(make_batch())
    return torch.compile(step, backend="aot_eager", fullgraph=True)


def run(step: Step, call: Callable[..., Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step, by the module itself or by what wraps it.

    A parameter without a gradient counts as one with zeros, as compiled backward passes make.
    """
    step.zero_grad()
    loss = (step if call is None else call)(make_batch())
    loss.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in step.named_parameters()
        if p.requires_grad
    }
    assert any(grad.abs().sum() > 0 for grad in grads.values())
    return loss.detach(), grads


@pytest.mark.parametrize("losses", [logits_loss, every_loss])
def test_compiled_step_is_the_eager_step(losses: Losses) -> None:
    step = Step(losses)
    expected = run(step)
    found = run(step, compiled(step))
    torch.testing.assert_close(found, expected)


def test_inductor_compiles_a_whole_step() -> None:
    step = Step(every_loss, make_model(layers=1, width=16, seed=0))
    step.projections = kdkernels.Projections([16], [24])
    expected = run(step)
    found = run(step, torch.compile(step, fullgraph=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_training_for_some_steps_gives_the_eager_weights() -> None:
    """With the optimizer's step compiled too: nothing is carried over that should not be."""
    weights = []
    for in_graphs in (False, True):
        step = Step(every_loss)
        optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-3)
        call, update = step, optimizer.step
        if in_graphs:
            call = compiled(step)
            update = torch.compile(optimizer.step, backend="aot_eager")
        for seed in range(3):
            call(make_batch(seed)).backward()
            update()
            optimizer.zero_grad()
        weights.append(dict(step.student.named_parameters()))
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_activation_checkpointing(in_graph: bool) -> None:
    expected = run(Step(every_loss).train())
    step = Step(every_loss).train()
    step.student.gradient_checkpointing_enable({"use_reentrant": False})
    step.teacher.eval()
    call = compiled(step) if in_graph else None
    torch.testing.assert_close(run(step, call), expected)


def test_autocast() -> None:
    """Losses are float32 on bfloat16 logits; the compiled step rounds where the eager one does."""
    step = Step(every_loss)
    plain, _ = run(step)

    def autocast(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(batch: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(batch)

        return wrapped

    expected = run(step, autocast(step))
    assert expected[0].dtype == torch.float32 and expected[0] != plain
    eps = torch.finfo(torch.bfloat16).eps
    assert abs(expected[0] - plain) < 4 * eps * plain.abs()
    loss, grads = run(step, autocast(compiled(step)))
    torch.testing.assert_close(loss, expected[0], rtol=eps, atol=0.0)
    for name, grad in grads.items():
        wanted = expected[1][name]
        assert (grad - wanted).norm() <= 4 * eps * wanted.norm() + 1e-6, name


def test_grad_scaler() -> None:
    """A scale that is a power of two leaves the step as it is; one that overflows skips it."""
    plain, scaled = Step(every_loss), Step(every_loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    updated = []
    for step in (plain, scaled):
        optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1)
        loss = step(make_batch())
        if step is plain:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        updated.append({name: p.detach().clone() for name, p in step.named_parameters()})
    torch.testing.assert_close(updated[1], updated[0])
    before = copy.deepcopy(scaled.state_dict())
    scaler.scale(scaled(make_batch()) * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(scaled.state_dict(), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("in_graph", [False, True])
def test_lora_student_in_a_plain_loop(in_graph: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0)
    base = make_model(layers=2, width=16, seed=0)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    step = Step(logits_loss, peft.get_peft_model(base, config))
    trained = [p for p in step.student.parameters() if p.requires_grad]
    assert 0 < len(trained) == 2 * 2 * 2  # layers, projections, matrices
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    call = compiled(step) if in_graph else step
    losses = []
    for _ in range(10):
        loss = call(make_batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in step.student.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")])


def test_cuda_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    step = Step(every_loss).cuda()
    static = {key: value.cuda() for key, value in make_batch().items()}

    def once() -> Tensor:
        step.zero_grad(set_to_none=False)
        loss = step(static)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    for key, value in make_batch(seed=8).items():
        static[key].copy_(value)
    graph.replay()
    found = captured.clone(), [p.grad.clone() for p in step.student.parameters()]
    expected = once(), [p.grad.clone() for p in step.student.parameters()]
    torch.testing.assert_close(found, expected)
