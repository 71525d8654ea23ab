"""Cutting, freezing and saving classifiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdkernels.api.distill import models
from kdkernels.api.distill.errors import DistillError


@pytest.fixture
def teacher(tiny_teacher: Path) -> models.Classifier:
    return models.load_classifier(tiny_teacher, ["neg", "pos"], "teacher", 0)


def test_cut_student_holds_copies_of_the_chosen_layers(teacher: models.Classifier) -> None:
    student = models.cut_layers(teacher, (3, 0))
    assert student.model.config.num_hidden_layers == 2
    layers, chosen = teacher.model.bert.encoder.layer, student.model.bert.encoder.layer
    for kept, original in zip(chosen, (layers[3], layers[0]), strict=True):
        for name, weight in kept.named_parameters():
            assert torch.equal(weight, original.get_parameter(name))
            assert weight.data_ptr() != original.get_parameter(name).data_ptr()
    assert len(layers) == 4, "the teacher stays whole"
    assert student.parameters < teacher.parameters


def test_saved_student_reloads_with_plain_transformers(
    teacher: models.Classifier, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    student = models.cut_layers(teacher, (0, 3))
    models.disable_dropout(student.model)
    student.save(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again).__name__ == "BertForSequenceClassification"
    assert again.config.id2label == {0: "neg", 1: "pos"}
    assert again.config.hidden_dropout_prob == 0.1
    batch = AutoTokenizer.from_pretrained(tmp_path)(["the good film"], return_tensors="pt")
    logits = again.eval()(**batch).logits
    torch.testing.assert_close(logits, student.model.eval()(**batch).logits)


def test_no_dropout_means_training_is_deterministic(teacher: models.Classifier) -> None:
    batch = teacher.tokenizer(["the good film was dull"], return_tensors="pt")
    teacher.model.train()
    assert not torch.equal(teacher.model(**batch).logits, teacher.model(**batch).logits)
    models.disable_dropout(teacher.model)
    assert torch.equal(teacher.model(**batch).logits, teacher.model(**batch).logits)


def test_head_depends_on_its_seed_alone(tiny_teacher: Path) -> None:
    heads = []
    for noise, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(noise)
        loaded = models.load_classifier(tiny_teacher, ["neg", "pos"], "teacher", seed)
        heads.append(loaded.model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_frozen_embeddings(teacher: models.Classifier) -> None:
    models.freeze_embeddings(teacher.model)
    frozen = {name for name, p in teacher.model.named_parameters() if not p.requires_grad}
    assert frozen and all("embeddings" in name for name in frozen)


def test_refusals(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"^student-layers must lie in 0..3 .*, got \[4, -1\]"):
        models.check_student_layers(tiny_teacher, (0, 4, -1))
    with pytest.raises(DistillError, match=r"^student must be a folder written by save_pretrained"):
        models.check_model_folder(tmp_path, "student", 128)
    with pytest.raises(DistillError, match=r"^max-length must be at most 128 for .*, got 129$"):
        models.check_model_folder(tiny_teacher, "teacher", 129)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        DistillError, match=r"^student must be a folder that transformers"
    ) as caught:
        models.load_classifier(tmp_path, ["a", "b"], "student", 0)
    assert "\n" not in str(caught.value)


def test_a_head_of_other_classes_is_refused(teacher: models.Classifier, tmp_path: Path) -> None:
    teacher.save(tmp_path)
    with pytest.raises(DistillError, match=r"^teacher must"):
        models.load_classifier(tmp_path, ["a", "b", "c"], "teacher", 0)
