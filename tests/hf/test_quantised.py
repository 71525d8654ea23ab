"""Models whose layers bitsandbytes has quantised: teachers, and students with LoRA (QLoRA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import Eager, distilled, lm, losses, settings, texts

from kdkernels.api import hf

transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

# It casts inputs in its own ways, and says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def quantised(folder: Path, kind: str, layers: int, seed: int) -> Any:
    """A model as ``from_pretrained`` makes it; the head stays as it is."""
    folder = folder / f"{kind}-{seed}"
    # Sizes that its kernels of 4 bits take.
    sizes = {"head_dim": 32, "intermediate_size": 64, "tie_word_embeddings": False}
    whole = lm(layers, 64, seed=seed, **sizes)
    whole.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(**KINDS[kind]),
        device_map={"": "cpu"},
    )
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_teacher(tmp_path: Path, kind: str) -> None:
    teacher = quantised(tmp_path, kind, 2, seed=5)
    expected = Eager(
        lm(), transformers.TrainingArguments(**settings(tmp_path)), teacher=teacher,
        temperature=2.0, train_dataset=texts(),
    )  # fmt: skip
    expected.train()
    trainer = distilled(tmp_path, teacher=hf.prepare_teacher(teacher))
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-3)
    with pytest.raises(ValueError, match="dtype must not be given for a quantised model"):
        hf.prepare_teacher(teacher, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_student_with_lora(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for make in (distilled, Eager):
        base = quantised(tmp_path, kind, 1, seed=0)
        torch.manual_seed(1)
        adapters = peft.LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"], r=4)
        student = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), adapters)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        teacher = lm(3, 32, seed=5)
        if make is distilled:
            trainer = distilled(tmp_path, student, teacher)
        else:
            trainer = Eager(
                student, transformers.TrainingArguments(**settings(tmp_path)), teacher=teacher,
                temperature=2.0, train_dataset=texts(),
            )  # fmt: skip
        trainer.train()
        found.append(losses(trainer))
        changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
        assert changed and all("lora_" in name for name in changed)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
