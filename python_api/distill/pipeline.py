"""A run of the classification objective: teacher, logits, every arm and seed, timing, report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.api.distill import log, measure, models, report, results, text, train
from kdkernels.api.distill.config import DistillConfig
from kdkernels.api.distill.data import Corpus
from kdkernels.api.distill.models import Classifier
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.results import ARMS, TEACHER, unit_name
from kdkernels.api.distill.store import RunFolder, write_file, write_folder
from kdkernels.api.distill.train import EvalSet, FitResult, Recipe, Runtime, TrainSet
from kdkernels.api.distill.units import Unit, Units

# The one teacher is the same whatever the students' seeds.
TEACHER_SEED = 0


def _summary(result: dict[str, Any]) -> str:
    """What the screen shows of a unit's result."""
    accuracy = result.get("test_accuracy")
    return "" if accuracy is None else f"test {accuracy:6.2f} %"


class Pipeline:
    """Does the units of one run in order, skipping the complete ones."""

    def __init__(
        self,
        config: DistillConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: Display,
        corpus: Corpus,
        teacher_source: Path,
    ) -> None:
        self.config = config
        self.folder = folder
        self.runtime = runtime
        self.display = display
        self.corpus = corpus
        self.teacher_source = teacher_source
        self.texts = {
            "train": corpus.train.texts,
            "dev": corpus.dev.texts,
            "test": corpus.test.texts,
            # Without texts of its own to transfer on, the teacher teaches on the training texts.
            "transfer": corpus.transfer or corpus.train.texts,
        }
        self._encoded: dict[tuple[str, str], list[list[int]]] = {}
        self._units = Units(folder, display, _summary)

    def run(self) -> None:
        """Does every unit that is not complete, then writes the report."""
        corpus, config = self.corpus, self.config
        self._check_data()
        units = [
            Unit(TEACHER, TEACHER, self._teacher),
            Unit("logits", "teacher's logits", self._logits),
        ]
        for arm, title in ARMS.items():
            for seed in config.seeds:
                name = unit_name(arm, seed)
                units.append(Unit(name, f"student, {title}, seed {seed}", self._student))
        units.append(Unit("student", "choose the student", self._keep_best))
        units.append(Unit("speed", "time loss and inference", self._speed))
        if config.throughput:
            units.append(Unit("throughput", "time kd_loss at LM size", self._throughput))
        found = results.gather(self._units.run(units), config.seeds)
        report.write(self.folder.path, config, found, corpus, self.runtime)
        report.show(self.display.console, self.folder.path, found)

    def _check_data(self) -> None:
        """Raises when the texts are not those the run began with; says how many there are."""
        corpus = self.corpus
        splits = [corpus.train, corpus.dev, corpus.test]
        content = [[split.texts, split.labels] for split in splits] + [corpus.transfer]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._units.check_data(digest, self.config.data)
        self.display.note(
            f"{corpus.source}: {len(corpus.train)} labelled, {len(self.texts['transfer'])} "
            f"transfer, {len(corpus.dev)} dev, {len(corpus.test)} test texts"
        )

    @property
    def _saved_teacher(self) -> Path:
        """The fine-tuned teacher; the given one when it is used as it is."""
        return self.folder.path / "teacher" if self.config.teacher_epochs else self.teacher_source

    def _load(self, path: Path, argument: str, seed: int) -> Classifier:
        return models.load_classifier(path, self.corpus.label_names, argument, seed)

    def _new_student(self, seed: int) -> Classifier:
        """A student as it is before training; its head depends on the seed alone."""
        if self.config.student is not None:
            student = self._load(Path(self.config.student), "student", seed)
        else:
            whole = self._load(self.teacher_source, "teacher", seed)
            student = models.cut_layers(whole, self.config.student_layers)
        models.disable_dropout(student.model)
        return student

    def _ids(self, classifier: Classifier, split: str) -> list[list[int]]:
        """The tokenised texts of a split, made once per tokenizer."""
        key = (classifier.tokenizer.name_or_path, split)
        if key not in self._encoded:
            self._encoded[key] = text.encode(
                classifier.tokenizer, self.texts[split], self.config.max_length
            )
        return self._encoded[key]

    def _fit(
        self,
        unit: str,
        classifier: Classifier,
        sets: list[TrainSet],
        recipe: Recipe,
        bar: Bar,
    ) -> FitResult:
        """Trains a model, logging to the screen and to the run's log."""
        if not self.config.train_embeddings:
            models.freeze_embeddings(classifier.model)
        dev = EvalSet(self._ids(classifier, "dev"), torch.tensor(self.corpus.dev.labels))
        pad, on_event = classifier.tokenizer.pad_token_id, self._listener(unit, bar)
        return train.fit(classifier.model, sets, dev, recipe, self.runtime, pad, on_event)

    def _listener(self, unit: str, bar: Bar) -> Callable[[dict[str, Any]], None]:
        """What takes the events of a training: the screen, and the run's log."""
        return log.listener(self.folder, unit, bar, "accuracy")

    def _log_evaluation(self, unit: str, step: int, split: str, accuracy: float) -> None:
        self.folder.log(unit, event="evaluation", step=step, split=split, accuracy=accuracy)

    def _test(self, unit: str, classifier: Classifier, fitted: FitResult) -> dict[str, Any]:
        """Evaluates on the test texts; returns the unit's result."""
        test = self.corpus.test
        ids = self._ids(classifier, "test")
        logits = train.predict(
            classifier.model, ids, self.runtime, classifier.tokenizer.pad_token_id
        )
        accuracy = train.accuracy(logits, torch.tensor(test.labels))
        self._log_evaluation(unit, fitted.steps, "test", accuracy)
        return {
            "test_accuracy": accuracy,
            "dev_accuracy": fitted.curve[-1][1] if fitted.curve else None,
            "curve": fitted.curve,
            "parameters": classifier.parameters,
            "steps": fitted.steps,
            "examples": fitted.examples,
            "train_seconds": fitted.seconds,
        }

    def _labelled_set(self, classifier: Classifier) -> TrainSet:
        labels = torch.tensor(self.corpus.train.labels)
        return TrainSet(self._ids(classifier, "train"), labels=labels)

    def _teacher(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Fine-tunes and saves the teacher, or just evaluates one that is used as it is."""
        fitted = FitResult()
        teacher = self._load(self.teacher_source, "teacher", TEACHER_SEED)
        if self.config.teacher_epochs:
            sets = [self._labelled_set(teacher)]
            recipe = Recipe(
                epochs=self.config.teacher_epochs,
                lr=self.config.teacher_lr,
                batch_size=self.config.batch_size,
                seed=TEACHER_SEED,
            )
            fitted = self._fit(unit, teacher, sets, recipe, bar)
        result = self._test(unit, teacher, fitted)
        if self.config.teacher_epochs:
            write_folder(self._saved_teacher, teacher.save)
        return result

    def _logits(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Computes the teacher's logits once; every arm and seed reads them from the file."""
        from safetensors.torch import save_file

        splits = ("transfer", "train")
        bar.total(sum(len(self.texts[split]) for split in splits))
        teacher = self._load(self._saved_teacher, "teacher", TEACHER_SEED)
        pad = teacher.tokenizer.pad_token_id
        logits = {
            split: train.predict(
                teacher.model, self._ids(teacher, split), self.runtime, pad, bar.advance
            )
            for split in splits
        }
        write_file(self._logits_file, lambda path: save_file(logits, path))
        return {"texts": {name: len(rows) for name, rows in logits.items()}}

    @property
    def _logits_file(self) -> Path:
        return self.folder.state / "teacher-logits.safetensors"

    @cached_property
    def _teacher_logits(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self._logits_file))

    def _student(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Trains and tests one student."""
        arm, _, seed_text = unit.rpartition("-seed")
        config, seed = self.config, int(seed_text)
        student = self._new_student(seed)
        sets = self._training_sets(arm, student)
        recipe = Recipe(
            epochs=config.label_epochs if arm == "labels" else config.epochs,
            lr=config.lr,
            batch_size=config.batch_size,
            seed=seed,
            temperature=config.temperature,
            alpha=config.alpha,
        )
        fitted = self._fit(unit, student, sets, recipe, bar)
        result = self._test(unit, student, fitted)
        if arm == "distilled":
            write_folder(self.folder.state / unit, student.save)
        return result

    def _training_sets(self, arm: str, student: Classifier) -> list[TrainSet]:
        """What an arm learns from; all arms but the first see the same texts."""
        if arm == "labels":
            return [self._labelled_set(student)]
        transfer = self._teacher_logits["transfer"]
        ids = self._ids(student, "transfer")
        if arm == "hard":
            return [TrainSet(ids, labels=transfer.argmax(-1))]
        sets = [TrainSet(ids, teacher=transfer)]
        if self.config.alpha < 1:
            labelled = self._labelled_set(student)
            sets.append(TrainSet(labelled.ids, labelled.labels, self._teacher_logits["train"]))
        return sets

    def _keep_best(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Moves the distilled student that did best on dev to ``student/``, drops the others."""
        names = {seed: unit_name("distilled", seed) for seed in self.config.seeds}
        best = max(names, key=lambda seed: self._units.result(names[seed])["dev_accuracy"])
        self._keep(names[best], list(names.values()))
        return {"seed": best}

    def _keep(self, best: str, names: list[str]) -> None:
        """Moves the student of a unit to ``student/``, drops those of the others."""
        source, target = self.folder.state / best, self.folder.path / "student"
        # A missing source: a killed process had moved it before it could say so.
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            os.rename(source, target)
        for name in names:
            shutil.rmtree(self.folder.state / name, ignore_errors=True)

    def _speed(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Times the loss at the shape of a training step, and the saved models on test texts."""
        config, classes = self.config, len(self.corpus.label_names)
        folders = {"teacher": self._saved_teacher, "student": self.folder.path / "student"}
        chosen = {}
        for name, folder in folders.items():
            loaded = self._load(folder, name, TEACHER_SEED)
            chosen[name] = (
                loaded.model,
                self._ids(loaded, "test"),
                loaded.tokenizer.pad_token_id,
            )
        return {
            "loss": measure.loss_times(
                config.batch_size, classes, config.temperature, self.runtime
            ),
            "inference": measure.inference_rates(chosen, self.runtime),
        }

    def _throughput(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Times the loss at language-model vocabularies."""
        return {"rows": [dict(row) for row in measure.throughput()]}
