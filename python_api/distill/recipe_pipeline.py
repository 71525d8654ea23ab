"""A run of recipes: the teacher, a student per recipe and seed, measurements, the report."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kdkernels.api.distill import (
    models,
    recipe_measure,
    recipe_report,
    recipe_results,
    recipe_train,
)
from kdkernels.api.distill.config import DistillConfig
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.models import Classifier
from kdkernels.api.distill.pipeline import TEACHER_SEED, Pipeline
from kdkernels.api.distill.progress import Bar
from kdkernels.api.distill.recipes import ARMS, SOFT, Options
from kdkernels.api.distill.results import TEACHER, unit_name
from kdkernels.api.distill.store import write_folder
from kdkernels.api.distill.train import EvalSet, Recipe
from kdkernels.api.distill.units import Unit


def options_of(config: DistillConfig) -> Options:
    """What of a configuration recipes use."""
    return Options(float(config.temperature), config.train_embeddings)


def check_recipes(config: DistillConfig, teacher: Path) -> None:
    """Raises for models that a recipe cannot map onto each other, before a run has a folder.

    Raises:
        DistillError: The message says which model, and why.
    """
    taught = models.empty_classifier(teacher, "teacher")
    if config.student is None:
        student = models.empty_classifier(teacher, "teacher", len(config.student_layers))
    else:
        student = models.empty_classifier(Path(config.student), "student")
        same = models.vocabulary(Path(config.student)) == models.vocabulary(teacher)
        contract = "have the teacher's tokenizer, so that their tokens are at the same places"
        require(same, "student", contract, f"another vocabulary in {config.student}")
    runtime = recipe_train.Runtime(torch.device("cpu"), bf16=False)
    for name in (SOFT, *config.recipe):
        recipe = recipe_train.make_recipe(ARMS[name], student, taught, options_of(config), 0)
        recipe_train.StepLoss(recipe, 0, student, taught, runtime)


class RecipePipeline(Pipeline):
    """Does the units of one run in order, skipping the complete ones."""

    def run(self) -> None:
        """Does every unit that is not complete, then writes the report."""
        config = self.config
        self._check_data()
        arms = (SOFT, *config.recipe)
        units = [Unit(TEACHER, TEACHER, self._teacher)]
        for arm in arms:
            for seed in config.seeds:
                title = f"student, {ARMS[arm].title}, seed {seed}"
                units.append(Unit(unit_name(arm, seed), title, self._student))
        units.append(Unit("student", "choose the student", self._keep_best))
        for arm in arms:
            title = f"measure, {ARMS[arm].title}"
            units.append(Unit(recipe_results.measure_name(arm), title, self._measure))
        found = recipe_results.gather(self._units.run(units), arms, config.seeds)
        recipe_report.write(self.folder.path, config, found, self.corpus, self.runtime)
        recipe_report.show(self.display.console, self.folder.path, found)

    @cached_property
    def _taught(self) -> Classifier:
        """The fine-tuned teacher, loaded once."""
        teacher = self._load(self._saved_teacher, TEACHER, TEACHER_SEED)
        teacher.model.to(self.runtime.device).eval().requires_grad_(False)
        return teacher

    def _recipe_student(self, seed: int) -> Classifier:
        student = self._new_student(seed)
        if not self.config.train_embeddings:
            models.freeze_embeddings(student.model)
        student.model.to(self.runtime.device)
        return student

    def _student(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Trains and tests one student; keeps it if it is the best on dev so far."""
        arm, _, seed_text = unit.rpartition("-seed")
        config, seed = self.config, int(seed_text)
        student, teacher = self._recipe_student(seed), self._taught.model
        recipe = recipe_train.make_recipe(
            ARMS[arm], student.model, teacher, options_of(config), seed
        )
        fitted = recipe_train.fit(
            recipe,
            student.model,
            teacher,
            self._ids(student, "transfer"),
            EvalSet(self._ids(student, "dev"), torch.tensor(self.corpus.dev.labels)),
            Recipe(config.epochs, config.lr, config.batch_size, seed),
            self.runtime,
            student.tokenizer.pad_token_id,
            self._listener(unit, bar),
        )
        result = self._test(unit, student, fitted)
        earlier = [self.folder.result(name) for name in self._student_units()]
        scores = [done["dev_accuracy"] for done in earlier if done is not None]
        if result["dev_accuracy"] > max(scores, default=-1.0):
            write_folder(self.folder.state / unit, student.save)
        return result

    def _student_units(self) -> list[str]:
        arms = (SOFT, *self.config.recipe)
        return [unit_name(arm, seed) for arm in arms for seed in self.config.seeds]

    def _keep_best(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Moves the student that did best on dev to ``student/``, drops the others."""
        names = self._student_units()
        best = max(names, key=lambda name: self._units.result(name)["dev_accuracy"])
        self._keep(best, names)
        return {"best": best}

    def _measure(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Time and memory of an arm's steps and losses, fused and eager."""
        student = self._recipe_student(self.config.seeds[0])
        setting = recipe_measure.Setting(
            arm=recipe_results.arm_of(unit),
            options=options_of(self.config),
            classes=self.corpus.label_names,
            teacher=self._saved_teacher,
            source=Path(self.config.student or self.teacher_source),
            layers=None if self.config.student else self.config.student_layers,
            lr=self.config.lr,
        )
        batches = recipe_measure.sample(
            self._ids(student, "transfer"), self.config, student.tokenizer.pad_token_id
        )
        return recipe_measure.measure(
            setting, student.model, self._taught.model, batches, self.runtime, self.config.quick
        )
