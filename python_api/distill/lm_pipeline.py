"""A run of the language-model objective: teacher, its cache, every arm and seed, timing, report."""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import kdkernels
from kdkernels.api.cache.reader import TeacherCache
from kdkernels.api.cache.writer import TeacherCacheWriter
from kdkernels.api.distill import (
    lm_measure,
    lm_models,
    lm_report,
    lm_results,
    lm_train,
    log,
    models,
)
from kdkernels.api.distill.errors import DistillError, require
from kdkernels.api.distill.lm_config import LmConfig
from kdkernels.api.distill.lm_data import SPLITS, Block, lm_blocks, spread
from kdkernels.api.distill.lm_results import ARMS, START, TEACHER
from kdkernels.api.distill.lm_train import LmLoss, Source
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.results import unit_name
from kdkernels.api.distill.store import RunFolder, write_folder
from kdkernels.api.distill.train import Loop, Recipe, Runtime, run
from kdkernels.api.distill.units import Unit, Units

# Of the text for the curves: a share of that for the final table.
DEV_SHARE = 2
# Of a log-probability in a cache of this run's own.
BITS = 8


def load_blocks(config: LmConfig, tokenizer: Any, display: Display) -> dict[str, list[Block]]:
    """The blocks of every split, as many as the configuration wants.

    They are spread evenly over the text: the first 8,192 tokens of WikiText-2's test split are
    three articles, and would say more about those than about the students.
    """
    wanted = {"train": config.tokens, "valid": None, "test": config.eval_tokens}
    if config.eval_tokens is not None:
        wanted["valid"] = config.eval_tokens // DEV_SHARE
    found = {}
    for split in SPLITS:
        every = lm_blocks(config.text, tokenizer, split, config.seq_len, notify=display.note)
        tokens = wanted[split]
        count = len(every) if tokens is None else max(1, tokens // config.seq_len)
        found[split] = spread(every, count)
    return found


def open_cache(config: LmConfig, folder: Path, teacher: Any, tokenizer: Any) -> TeacherCache | None:
    """The teacher's cache in a folder; None where there is none yet.

    Raises:
        DistillError: It is of another teacher, tokenizer, temperature or number of classes.
    """
    try:
        return TeacherCache(
            folder,
            tokenizer=tokenizer,
            vocab_size=len(lm_models.head_of(teacher).weight),
            k=config.top_k,
            temperature=config.temperature,
            shift=1,
            teacher=teacher_name(config),
        )
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DistillError(f"cache must be one of this run's teacher, got {error}") from error


def teacher_name(config: LmConfig) -> str:
    """The teacher's name in a cache, as ``kdkernels cache build`` gives it."""
    return Path(config.model).resolve().name


class LmPipeline:
    """Does the units of one run in order, skipping the complete ones."""

    def __init__(
        self,
        config: LmConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: Display,
        teacher: Any,
        tokenizer: Any,
        blocks: dict[str, list[Block]],
    ) -> None:
        self.config = config
        self.folder = folder
        self.runtime = runtime
        self.display = display
        self.teacher = teacher.to(runtime.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.blocks = blocks
        self._units = Units(folder, display, _summary)

    def run(self) -> None:
        """Does every unit that is not complete, then writes the report."""
        config = self.config
        self._check_data()
        counts = {split: len(part) * config.seq_len for split, part in self.blocks.items()}
        self.display.note(
            f"{config.text}: {counts['train']:,} training, {counts['valid']:,} dev and "
            f"{counts['test']:,} test tokens in blocks of {config.seq_len}"
        )
        units = [
            Unit(TEACHER, TEACHER, self._teacher),
            Unit(START, "student before training", self._start),
            Unit("cache", "teacher's top-k cache", self._cache),
        ]
        for arm, title in ARMS.items():
            for seed in config.seeds:
                units.append(Unit(unit_name(arm, seed), f"{title}, seed {seed}", self._student))
        units.append(Unit("student", "choose the student", self._keep_best))
        units.append(Unit("routes", "measure the loss routes", self._routes))
        found = lm_results.gather(self._units.run(units), config.seeds)
        lm_report.write(self.folder.path, config, found, counts, self.runtime)
        lm_report.show(self.display.console, self.folder.path, found)

    def _check_data(self) -> None:
        """Raises when the tokens are not those the run began with."""
        digest = hashlib.sha256()
        for part in self.blocks.values():
            digest.update(lm_train.stack(part).numpy().tobytes())
        self._units.check_data(digest.hexdigest(), self.config.text)

    def _evaluate(self, model: Any, bar: Bar, dev: float | None = None) -> dict[str, Any]:
        """Perplexities on dev and test blocks; that on dev is not computed if it is known."""
        splits = ["valid", "test"] if dev is None else ["test"]
        bar.total(sum(len(self.blocks[split]) for split in splits))
        found = {
            split: lm_train.perplexity(model, self.blocks[split], self.runtime, bar.advance)
            for split in splits
        }
        return {
            "dev_perplexity": found.get("valid", dev),
            "test_perplexity": found["test"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    def _teacher(self, unit: str, bar: Bar) -> dict[str, Any]:
        return self._evaluate(self.teacher, bar)

    def _start(self, unit: str, bar: Bar) -> dict[str, Any]:
        return self._evaluate(self._new_student(), bar)

    def _new_student(self) -> Any:
        """A student as it is before training."""
        student = lm_models.make_student(self.teacher, self.config.layers).requires_grad_(True)
        models.disable_dropout(student)
        if not self.config.train_embeddings:
            lm_models.freeze_embeddings(student)
        return student

    @property
    def _cache_folder(self) -> Path:
        given = self.config.cache
        return Path(given) if given is not None else self.folder.path / "teacher-cache"

    def _cache(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Writes what the cache lacks of the training blocks."""
        config, known = self.config, self._open_cache()
        with TeacherCacheWriter(
            self._cache_folder,
            k=config.top_k,
            vocab_size=len(lm_models.head_of(self.teacher).weight),
            temperature=float(config.temperature),
            tokenizer=self.tokenizer,
            teacher=teacher_name(config),
            rows=len(self.blocks["train"]) * config.seq_len,
            bits=BITS if known is None else known.manifest.bits,
        ) as writer:
            missing = [block for block in self.blocks["train"] if not writer.done(*block)]
            bar.total(len(missing))
            size = max(1, lm_train.EVALUATION_TOKENS // config.seq_len)
            for start in range(0, len(missing), size):
                self._add(writer, missing[start : start + size])
                bar.advance(size)
        files = [path.stat().st_size for path in self._cache_folder.glob("*") if path.is_file()]
        return {"blocks": len(missing), "bytes": sum(files)}

    @torch.inference_mode()
    def _add(self, writer: TeacherCacheWriter, blocks: list[Block]) -> None:
        head = lm_models.head_of(self.teacher)
        tokens = lm_train.stack(blocks).to(self.runtime.device)
        hidden = lm_train.head_input(self.teacher, tokens, self.runtime)
        with lm_train.head_precision(self.runtime):
            top = kdkernels.topk_logprobs(
                hidden,
                self.config.top_k,
                weight=head.weight,
                bias=head.bias,
                temperature=self.config.temperature,
            )
        ids, logprobs = top.ids.cpu(), top.logprobs.cpu()
        for place, (name, block) in enumerate(blocks):
            writer.add(name, block, ids[place], logprobs[place])

    def _open_cache(self) -> TeacherCache | None:
        return open_cache(self.config, self._cache_folder, self.teacher, self.tokenizer)

    @cached_property
    def _stored(self) -> TeacherCache:
        found = self._open_cache()
        require(found is not None, "cache", "stay where it is", f"none in {self._cache_folder}")
        assert found is not None
        return found

    def _source(self, arm: str) -> Source:
        if arm == "live":
            return Source(teacher=self.teacher)
        return Source(cache=self._stored) if arm == "cached" else Source()

    def _student(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Trains and tests one student."""
        config = self.config
        arm, _, seed_text = unit.rpartition("-seed")
        student = self._new_student().to(self.runtime.device)
        loss = LmLoss(
            self._source(arm), config.route, config.temperature, config.alpha, self.runtime
        )
        steps = lm_train.schedule(
            self.blocks["train"], config.batch_size, config.epochs, int(seed_text)
        )

        loop = Loop[list[Block]](
            loss=lambda step: loss.parts(student, step),
            evaluate=lambda: lm_train.perplexity(student, self.blocks["valid"], self.runtime),
            metric="dev_perplexity",
            size=len,
            on_event=log.listener(self.folder, unit, bar, "perplexity"),
            tokens=lambda step: len(step) * config.seq_len,
        )
        recipe = Recipe(
            config.epochs, config.lr, config.batch_size, int(seed_text), config.temperature
        )
        fitted = run(student, steps, loop, recipe)
        found = self._evaluate(student, bar, fitted.curve[-1][1])
        self.folder.log(unit, event="test", step=fitted.steps, **found)
        if arm != "ce":
            write_folder(self.folder.state / unit, lambda path: self._save(student, path))
        return {
            **found,
            "curve": fitted.curve,
            "steps": fitted.steps,
            "tokens": fitted.examples * config.seq_len,
            "train_seconds": fitted.seconds,
        }

    def _save(self, student: Any, folder: Path) -> None:
        """Writes a student as plain transformers files."""
        student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _keep_best(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Moves the distilled student that did best on dev to ``student/``, drops the others."""
        arms = [arm for arm in ARMS if arm != "ce"]
        names = [unit_name(arm, seed) for arm in arms for seed in self.config.seeds]
        best = min(names, key=lambda name: self._units.result(name)["dev_perplexity"])
        source, target = self.folder.state / best, self.folder.path / "student"
        # A missing source: a killed process had moved it before it could say so.
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            os.rename(source, target)
        for name in names:
            shutil.rmtree(self.folder.state / name, ignore_errors=True)
        return {"best": best}

    def _routes(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Memory and speed of the loss, from hidden states and from full logits."""
        config, weight = self.config, lm_models.head_of(self.teacher).weight
        step = config.batch_size * config.seq_len
        shape = lm_measure.Shape(
            rows=step if config.quick else max(step, lm_measure.ROWS),
            vocab=weight.shape[0],
            width=weight.shape[1],
            top_k=config.top_k,
            temperature=config.temperature,
            alpha=config.alpha,
            train_head=config.train_embeddings,
        )
        return {"routes": lm_measure.routes(shape, self.runtime)}


def _summary(result: dict[str, Any]) -> str:
    """What the screen shows of a unit's result."""
    found = result.get("test_perplexity")
    return "" if found is None else f"test {lm_results.figure(found)}"
