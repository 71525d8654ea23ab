"""A run of Meta-KD: scores, teachers, the students of every domain, the report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.api.distill import config as configs
from kdkernels.api.distill import (
    fetch,
    metakd_report,
    metakd_results,
    metakd_train,
    models,
    text,
    train,
)
from kdkernels.api.distill.data import Corpus, Labelled
from kdkernels.api.distill.domain_readers import load_domains
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.metakd_config import TEACHERS, MetaKdConfig, teacher_of
from kdkernels.api.distill.metakd_results import slug, student_unit, teacher_unit
from kdkernels.api.distill.metakd_train import Examples, Setting
from kdkernels.api.distill.pipeline import TEACHER_SEED
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.store import RunFolder, write_file, write_folder
from kdkernels.api.distill.train import Runtime
from kdkernels.api.distill.units import Unit, Units
from kdkernels.api.methods.meta_teacher import MetaTeacher
from kdkernels.api.prototypes import instance_scores

SCORES = "scores"
# What a teacher depends on, beside the data.
TEACHER_KEYS = (
    "model",
    "leave_out",
    "max_length",
    "batch_size",
    "teacher_epochs",
    "teacher_lr",
    "train_embeddings",
    "gamma1",
    "domain_dropout",
    "faithful_to",
)
SPLITS = ("train", "dev", "test")


def load_corpora(config: MetaKdConfig, notify: fetch.Notify) -> dict[str, Corpus]:
    """The texts of each domain, cut to the sizes of a run."""
    data = None if config.data is None else Path(config.data)
    found = load_domains(config.task, data, notify, config.domain_column)
    corpora = {}
    for name, corpus in found.corpora().items():
        parts: dict[str, Any] = {}
        for split, count in (("train", config.labels), ("dev", config.dev), ("test", config.test)):
            part: Labelled = getattr(corpus, split)
            option, enough = "labels" if split == "train" else split, len(part)
            fits = config.quick or count is None or count <= enough
            contract = f"be at most {enough}, the {split} texts of {name}"
            require(fits, option, contract, count)
            parts[split] = part.head(count)
        corpora[name] = replace(corpus, transfer=[], **parts)
    return corpora


class MetaKdPipeline:
    """Does the units of one run in order, skipping the complete ones."""

    def __init__(
        self,
        config: MetaKdConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: Display,
        domains: Mapping[str, Corpus],
        model: Path,
    ) -> None:
        """Args: as their names say; ``domains`` have the corpus of each, cut to the run's size."""
        self.config, self.folder, self.runtime = config, folder, runtime
        self.display, self.domains, self.model = display, domains, model
        self._names = list(domains)
        self._label_names = next(iter(domains.values())).label_names
        self._units = Units(folder, display, self._summary)
        self._loaded: tuple[str, Any] | None = None
        for key in ("leave_out", "domains"):
            given = getattr(config, key)
            for name in (given,) if isinstance(given, str) else given or ():
                known = f"name a domain of {', '.join(self._names)}"
                require(name in domains, key.replace("_", "-"), known, repr(name))
        left = len(self._taught)
        require(left >= 2, "data", "have at least two domains to train teachers on", left)

    @property
    def _taught(self) -> list[str]:
        """The domains that teachers are trained on."""
        return [name for name in self._names if name != self.config.leave_out]

    @property
    def _students(self) -> list[str]:
        """The domains that there are students of."""
        if self.config.leave_out is not None:
            return [self.config.leave_out]
        return [name for name in self._names if name in (self.config.domains or self._names)]

    def run(self) -> None:
        """Does every unit that is not complete, then writes the report."""
        self._check_data()
        for name, corpus in self.domains.items():
            counts = f"{len(corpus.train)} train, {len(corpus.dev)} dev, {len(corpus.test)} test"
            self.display.note(f"{name}: {counts} texts")
        results = self._units.run(self._plan())
        found = metakd_results.gather(results, self.config, self._names, self._students)
        metakd_report.write(self.folder.path, self.config, found, self.domains, self.runtime)
        metakd_report.show(self.display.console, self.folder.path, found)

    def _plan(self) -> list[Unit]:
        units = [Unit(SCORES, "prototype scores", self._score)]
        for kind in dict.fromkeys(teacher_of(arm) for arm in self._arms):
            for domain in self._students if kind == "own" else [""]:
                title = f"teacher, {kind} {domain}".strip()
                work = partial(self._teacher, kind, domain)
                units.append(Unit(teacher_unit(kind, domain), title, work))
        for name, arm, domain, share, seed in self._experiments():
            title = f"{arm}, {domain}, {share:.0%}, seed {seed}"
            units.append(Unit(name, title, partial(self._student, arm, domain, share, seed)))
        units.append(Unit("students", "keep the students", self._keep))
        return units

    @property
    def _arms(self) -> list[str]:
        """Teacher by teacher, so that each is loaded once."""
        return sorted(self.config.arms, key=lambda arm: TEACHERS.index(teacher_of(arm)))

    def _experiments(self) -> Iterator[tuple[str, str, str, float, int]]:
        """Unit, arm, domain, share and seed of every student, in the order of the run."""
        for arm in self._arms:
            for domain in self._students:
                for share in self.config.share:
                    for seed in self.config.seeds:
                        name = student_unit(arm, domain, share, seed)
                        yield name, arm, domain, share, seed

    def _summary(self, result: dict[str, Any]) -> str:
        figure = result.get("test")
        if isinstance(figure, dict):
            return " ".join(f"{value:.1f}" for value in figure.values())
        return "" if figure is None else f"test {figure:6.2f} %"

    def _check_data(self) -> None:
        """Raises when the texts are not those the run began with."""
        content = {
            name: [[part.texts, part.pairs, part.labels] for part in (c.train, c.dev, c.test)]
            for name, c in self.domains.items()
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._units.check_data(digest, self.config.data)

    # ---- data ------------------------------------------------------------------------------------

    @cached_property
    def _tokenizer(self) -> Any:
        return models.load_tokenizer(self.model, "model")

    @cached_property
    def special_ids(self) -> list[int]:
        """Tokens that are no content; an unknown word is some."""
        unknown = {self._tokenizer.unk_token_id}
        return sorted(set(self._tokenizer.all_special_ids) - unknown)

    @cached_property
    def _setting(self) -> Setting:
        return Setting(self.config, self.runtime, self._tokenizer.pad_token_id)

    @cached_property
    def _examples(self) -> dict[tuple[str, str], Examples]:
        """The texts of each domain and split, numbered as the domains that are taught are."""
        found = {}
        for name, corpus in self.domains.items():
            for split in SPLITS:
                part: Labelled = getattr(corpus, split)
                length = self.config.max_length
                ids = text.encode(self._tokenizer, part.texts, length, part.pairs)
                number = torch.full((len(ids),), self._number(name))
                found[name, split] = Examples(ids, torch.tensor(part.labels), number)
        return found

    def _number(self, domain: str) -> int:
        """A domain's number with the teachers; -1 where they do not know it."""
        return self._taught.index(domain) if domain in self._taught else -1

    def _training(self, domain: str, of: str) -> Examples:
        """A domain's training texts with the scores that teachers or students go by."""
        examples = self._examples[domain, "train"]
        scores = self._scores[f"{of}/{self._names.index(domain)}"]
        return Examples(examples.ids, examples.labels, examples.domains, scores)

    # ---- scores ----------------------------------------------------------------------------------

    @property
    def _scores_file(self) -> Path:
        return self.folder.state / "scores.safetensors"

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self._scores_file))

    def _score(self, unit: str, bar: Bar) -> dict[str, Any]:
        """How typical each text is, by the model before any training.

        Teachers go by the domains that they are trained on; students by all of them.
        """
        from safetensors.torch import save_file

        found: dict[str, Tensor] = {}
        parts = self._scores_of(self._names)
        for of, names in (("student", self._names), ("teacher", self._taught)):
            if names != self._names:
                parts = self._scores_of(names)
            # Files of tensors want no memory in common.
            found |= {f"{of}/{self._names.index(n)}": parts[n].clone() for n in names}
        write_file(self._scores_file, lambda path: save_file(found, path))
        return {
            "mean": {
                name: found[f"student/{i}"].mean().item() for i, name in enumerate(self._names)
            }
        }

    def _scores_of(self, names: list[str]) -> dict[str, Tensor]:
        """The scores of the training texts of some domains, by these domains' prototypes."""
        parts = [self._examples[name, "train"] for name in names]
        numbered = [
            replace(part, domains=torch.full_like(part.domains, number))
            for number, part in enumerate(parts)
        ]
        joined = Examples.joined(numbered)
        batches = text.inference_batches([len(ids) for ids in joined.ids], train.INFERENCE_BATCH)
        loader = (
            {**self._setting.batch(joined, rows), "domains": joined.domains[rows]}
            for rows in batches
        )
        with self.runtime.autocast():
            found = instance_scores(
                self._classifier(self.model, TEACHER_SEED),
                loader,
                n_domains=len(names),
                n_classes=len(self._label_names),
                form=self.config.faithful_to,
                special_ids=self.special_ids,
                faithful_to=self.config.faithful_to,
            )
        scores = torch.empty_like(found)
        scores[[row for rows in batches for row in rows]] = found
        sizes = [len(part.ids) for part in parts]
        return dict(zip(names, scores.split(sizes), strict=True))

    # ---- teachers --------------------------------------------------------------------------------

    def _classifier(self, path: Path, seed: int) -> Any:
        """A classifier in a folder, on the run's device, without dropout."""
        kind = "AutoModelForSequenceClassification"
        heading = models.Heading(kind, "a sequence classifier", self._label_names)
        model = models.load_headed(path, heading, "model", seed)
        models.disable_dropout(model)
        if not self.config.train_embeddings:
            models.freeze_embeddings(model)
        return model.to(self.runtime.device)

    def _with_head(self, model: Any) -> MetaTeacher:
        config = self.config
        return MetaTeacher(
            model,
            len(self._taught),
            special_ids=self.special_ids,
            gamma1=config.gamma1,
            dropout=config.domain_dropout,
            faithful_to=config.faithful_to,
            seed=TEACHER_SEED,
        )

    def _teacher(self, kind: str, domain: str, unit: str, bar: Bar) -> dict[str, Any]:
        """Trains and saves one teacher, or takes another run's; its figure in every domain."""
        if self.config.teachers is not None:
            return self._taken(Path(self.config.teachers), unit)
        names = [domain] if kind == "own" else self._taught
        examples = Examples.joined([self._training(name, "teacher") for name in names])
        model = self._classifier(self.model, TEACHER_SEED)
        teacher = self._with_head(model) if kind == "meta" else model
        listener = self._listener(unit, bar)
        fitted = metakd_train.fit_teacher(self._setting, teacher, examples, TEACHER_SEED, listener)

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
            if isinstance(teacher, MetaTeacher):
                teacher.save_head(folder)

        write_folder(self.folder.path / unit, save)
        figures = {
            split: {name: self._accuracy(model, name, split) for name in self._names}
            for split in ("dev", "test")
        }
        return {**figures, "steps": fitted.steps, "train_seconds": fitted.seconds}

    def check_teachers(self) -> None:
        """Raises unless the other run that teachers are taken from has been like this one."""
        if self.config.teachers is None:
            return
        source = Path(self.config.teachers)
        file = RunFolder(source).config_file
        require(file.is_file(), "teachers", "be the folder of a run", source)
        stored = configs.from_yaml(file.read_text(encoding="utf-8"))
        for key in TEACHER_KEYS:
            own, theirs = getattr(self.config, key), getattr(stored, key, None)
            option = configs.option_name(key)
            require(own == theirs, "teachers", f"be of a run with {option} {own}", theirs)

    def _taken(self, source: Path, unit: str) -> dict[str, Any]:
        """The teacher of another run."""
        self.check_teachers()
        other = RunFolder(source)
        result, data = other.result(unit), other.result("data")
        contract = "be the folder of a run with the same data and this teacher"
        same = data is not None and data["sha256"] == self._units.result("data")["sha256"]
        require(same, "teachers", contract, f"other data in {source}")
        found = result is not None and (source / unit).is_dir()
        require(found, "teachers", contract, f"{source} without {unit}")
        assert result is not None
        write_folder(
            self.folder.path / unit,
            lambda path: shutil.copytree(source / unit, path, dirs_exist_ok=True),
        )
        return result

    def _load_teacher(self, kind: str, domain: str) -> Any:
        """A trained teacher; the one that was asked for last is kept."""
        unit = teacher_unit(kind, domain if kind == "own" else "")
        if self._loaded is None or self._loaded[0] != unit:
            folder = self.folder.path / unit
            teacher = self._classifier(folder, TEACHER_SEED)
            if kind == "meta":
                teacher = self._with_head(teacher)
                teacher.load_head(folder)
            teacher.requires_grad_(False)
            self._loaded = unit, teacher
        return self._loaded[1]

    # ---- students --------------------------------------------------------------------------------

    def _student(
        self, arm: str, domain: str, share: float, seed: int, unit: str, bar: Bar
    ) -> dict[str, Any]:
        """Trains and tests one student; keeps it if it is its domain's best on dev so far."""
        config = self.config
        whole = models.Classifier(self._classifier(self.model, seed), self._tokenizer)
        student = models.cut_layers(whole, config.student_layers).model
        examples = self._training(domain, "student")
        examples = examples.head(max(1, round(share * len(examples.ids))))
        fitted = metakd_train.fit_student(
            self._setting,
            arm,
            student,
            self._load_teacher(teacher_of(arm), domain),
            examples,
            self._number(domain),
            config.epochs * config.repeats(share),
            seed,
            self._listener(unit, bar),
        )
        result = {
            "dev": self._accuracy(student, domain, "dev"),
            "test": self._accuracy(student, domain, "test"),
            "examples": len(examples.ids),
            "parameters": sum(p.numel() for p in student.parameters()),
            "steps": fitted.steps,
            "train_seconds": fitted.seconds,
        }
        best = self._best(domain)
        if best is None or result["dev"] > best[1]:
            kept = self.folder.state / f"best-{slug(domain)}"
            write_folder(kept, models.Classifier(student, self._tokenizer).save)
        return result

    def _best(self, domain: str) -> tuple[str, float] | None:
        """The completed unit of a domain with the best dev figure; of equal ones the first."""
        names = [name for name, _, own, _, _ in self._experiments() if own == domain]
        found = [(name, self.folder.result(name)) for name in names]
        done = [(name, result["dev"]) for name, result in found if result is not None]
        return max(done, key=lambda pair: pair[1]) if done else None

    def _keep(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Moves the student of each domain that did best on its dev texts to ``student-NAME/``."""
        kept = {}
        for domain in self._students:
            name = slug(domain)
            source, target = (
                self.folder.state / f"best-{name}",
                self.folder.path / f"student-{name}",
            )
            # A missing source: a killed process had moved it before it could say so.
            if source.exists():
                shutil.rmtree(target, ignore_errors=True)
                os.rename(source, target)
            best = self._best(domain)
            kept[domain] = None if best is None else best[0]
        return {"kept": kept}

    def _accuracy(self, model: Any, domain: str, split: str) -> float:
        """Of a domain's own texts."""
        examples = self._examples[domain, split]
        pad = self._tokenizer.pad_token_id
        logits = train.predict(model, examples.ids, self.runtime, pad)
        return train.accuracy(logits, examples.labels)

    def _listener(self, unit: str, bar: Bar) -> Any:
        """What takes the events of a training: the screen, and the run's log."""

        def on_event(event: dict[str, Any]) -> None:
            bar.event(event)
            if "loss" in event:
                kept = {key: event[key] for key in ("step", "loss", "lr")}
                self.folder.log(unit, event="step", **kept)

        return on_event
