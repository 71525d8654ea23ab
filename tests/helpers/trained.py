"""Tiny language models that a Trainer distils; run as a script by its tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import WeightAverager

# Whoever imports this module is skipped without them.
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from kdkernels.api import hf  # noqa: E402
from kdkernels.api.hf.losses import StudentLoss  # noqa: E402

VOCAB, TOKENS = 97, 9


def lm(layers: int = 1, width: int = 16, kind: str = "Llama", seed: int = 0, **options: Any) -> Any:
    """A causal language model, the same for the same arguments; logits of some size."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8,
        "tie_word_embeddings": True, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, **options,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**values)
    return transformers.AutoModelForCausalLM.from_config(config)


def tokenizer() -> Any:
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"<pad>": VOCAB - 2, "</s>": VOCAB - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>"
    )


def texts(number: int = 12, **more: Any) -> list[dict[str, Any]]:
    """Padded texts of which more and more begins with a prompt that has no labels."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(number):
        tokens = torch.randint(1, VOCAB, (TOKENS,), generator=generator)
        mask = (torch.arange(TOKENS) < TOKENS - index % 3).long()
        labels = torch.where(mask == 1, tokens, -100)
        labels[: index % 6] = -100
        found.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels, **more})
    return found


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of a short training.

    AdamW would make steps of full size of gradients that are 0 but for rounding, such as those of
    the keys' biases: its epsilon is above them.
    """
    return {
        "adam_epsilon": 1e-4,
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip


def distilled(folder: Path, student: Any = None, teacher: Any = None, **options: Any) -> Any:
    """A trainer of a student of one layer, by default with a teacher of three wider ones."""
    names = set(hf.DistillOptions.__dataclass_fields__)
    spec = {"temperature": 2.0, **{k: options.pop(k) for k in names & set(options)}}
    own = {"callbacks", "train_dataset", "eval_dataset", "data_collator"}
    rest = {k: options.pop(k) for k in own & set(options)}
    return hf.DistillTrainer(
        lm() if student is None else student,
        hf.DistillArguments(**spec, **settings(folder, **options)),
        teacher=lm(3, 32, seed=5) if teacher is None else teacher,
        **{"train_dataset": texts(), "eval_dataset": texts(5), **rest},
    )


class Eager(transformers.Trainer):
    """What one writes without this package: the logits of both models, in losses of torch."""

    def __init__(self, *args: Any, teacher: Any, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher, self._temperature = teacher.eval(), temperature

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**given)
        with torch.no_grad():
            teacher = self._teacher(**given).logits
        loss = eager_loss(outputs.logits, teacher, inputs["labels"], self._temperature)
        loss = loss / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Half of cross-entropy and half of the divergence, the sum over the tokens with a label."""
    target = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    hard = F.cross_entropy(student, target, reduction="sum")
    log_s, log_t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    rows = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    return 0.5 * hard + 0.5 * temperature**2 * rows[target != -100].sum()


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of a model's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Two trainings that differ in the order of sums only."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=tolerance, msg=name)


def losses(trainer: Any) -> list[float]:
    """The logged losses of the steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- in processes of their own -------------------------------------------------------------------


def whole_run(folder: Path) -> tuple[Any, WeightAverager]:
    """A run with everything that a checkpoint must bring back."""
    student = lm(2, attention_dropout=0.2)
    trainer = distilled(
        folder, student, hidden_weight=0.3, hidden_layers="1:1,2:3", max_steps=6,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    averager = WeightAverager(student, "ema", decay=0.7, start_step=2)
    hf.AveragingCallback(averager).attach(trainer)
    return trainer, averager


def killed(folder: Path, step: int) -> None:
    """Dies in the middle of writing the checkpoint of a step."""
    trainer, _ = whole_run(folder)
    save = trainer._save_rng_state

    def die(place: str) -> None:
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(place)

    trainer._save_rng_state = die
    trainer.train()


def sharded_student(teacher: hf.Teacher) -> None:
    """The gradients of a student that FSDP2 has divided are those of a whole one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    batch = {name: torch.stack([text[name] for text in texts(4)]) for name in texts(1)[0]}
    count = int((batch["labels"][:, 1:] != -100).sum())
    grads = []
    for divided in (False, True):
        student = lm(2)
        loss = StudentLoss(student, teacher, hf.DistillOptions(temperature=2.0))
        if divided:
            for layer in student.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(student, mesh=mesh)
        mine = {k: v.chunk(2)[rank] for k, v in batch.items()} if divided else batch
        given = loss.inputs(student, mine)
        loss.check(student, given)
        found, _ = loss(student, given, mine, teacher(given), count, False)
        (found.loss * (2 if divided else 1)).backward()
        grads.append({n: p.grad for n, p in student.named_parameters()})
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad.full_tensor(), grads[0][name], rtol=1e-4, atol=1e-6)


def parallel(folder: Path) -> None:
    """Two processes, each with its own part of every batch; one teacher each, then a shared one."""
    for sharded in (False, True):
        teacher: Any = lm(3, 32, seed=5)
        if sharded:
            teacher = hf.prepare_teacher(teacher, shard=True)
            sharded_student(teacher)
        trainer = distilled(
            folder, teacher=teacher, hidden_weight=0.3, gradient_accumulation_steps=1,
            train_sampling_strategy="sequential", ddp_backend="gloo",
            ddp_find_unused_parameters=True,
        )  # fmt: skip
        trainer.train()
        metrics = trainer.evaluate(texts(4))
        if trainer.args.process_index == 0:
            result = {"weights": weights(trainer.model), "logs": trainer.state.log_history}
            torch.save({**result, "metrics": metrics}, folder / f"{sharded}.pt")
    torch.distributed.barrier()
    # No teardown: on a busy machine gloo's may wait for ever for a thread that waits for Python.
    os._exit(0)


if __name__ == "__main__":
    task, place, *step = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    killed(Path(place), int(*step)) if task == "killed" else parallel(Path(place))
