"""Opens or reopens a run, gathers what it needs, and hands over to the pipeline."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from kdkernels.api.distill import config as configs
from kdkernels.api.distill import fetch, models
from kdkernels.api.distill.config import DistillConfig, RunConfig
from kdkernels.api.distill.data import Corpus, Limits
from kdkernels.api.distill.diito_config import DiitoConfig
from kdkernels.api.distill.errors import DistillError, RunStopped, require
from kdkernels.api.distill.finetune_config import FinetuneConfig
from kdkernels.api.distill.lm_config import LmConfig
from kdkernels.api.distill.metakd_config import MetaKdConfig
from kdkernels.api.distill.own_data import load_own
from kdkernels.api.distill.pipeline import Pipeline
from kdkernels.api.distill.progress import Display
from kdkernels.api.distill.sentiment import load_sentiment
from kdkernels.api.distill.stark_config import StarkConfig
from kdkernels.api.distill.store import RunFolder, disk_error
from kdkernels.api.distill.swa_config import SwaConfig
from kdkernels.api.distill.train import Runtime


def distill(given: Mapping[str, Any], resume: bool, console: Console) -> Path:
    """Runs or resumes a distillation.

    Args:
        given: Configuration values the user chose; the rest takes its default or, on resume, the
            stored run's value.
        resume: Whether to continue an existing run.
        console: Where to print.

    Returns:
        The run's folder.

    Raises:
        DistillError: Anything the user can act on.
    """
    quiet_transformers()
    config = open_config(given, resume)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        _run(config, console)
    finally:
        torch.set_num_threads(threads)  # also a caller's, who may go on with other work
    return config.folder


def _run(config: RunConfig, console: Console) -> None:
    folder = RunFolder(config.folder)
    work = PREPARE[type(config)](config, folder, choose_runtime(config), Display(console))
    try:
        if not folder.config_file.is_file():
            folder.create(configs.to_yaml(config))
        with folder.locked():
            work()
    except KeyboardInterrupt as error:
        if folder.config_file.is_file():
            raise RunStopped(resume_hint(config)) from error
        raise
    except Exception as error:
        sentence = disk_error(error, config.folder)
        if sentence is None:
            raise
        raise sentence from error


def resume_hint(config: RunConfig) -> str:
    """How to go on with a stopped run."""
    command = config.objective if config.objective == "finetune" else "distill"
    out = "" if config.out == RunConfig.out else f" --out {shlex.quote(config.out)}"
    return f"resume with: kdkernels {command} --resume --name {config.name}{out}"


def prepare_classification(
    config: DistillConfig, folder: RunFolder, runtime: Runtime, display: Display
) -> Callable[[], None]:
    """Gathers what the run needs, before it has a folder; returns the run."""
    corpus = load_corpus(config, display)
    teacher = Path(config.teacher) if config.teacher else fetch.teacher_folder(display.note)
    check_models(config, teacher)
    corpus = match_labels(config, teacher, corpus)
    if config.recipe:
        from kdkernels.api.distill.recipe_pipeline import RecipePipeline, check_recipes

        check_recipes(config, teacher)
        return RecipePipeline(config, folder, runtime, display, corpus, teacher).run
    return Pipeline(config, folder, runtime, display, corpus, teacher).run


def prepare_lm(
    config: LmConfig, folder: RunFolder, runtime: Runtime, display: Display
) -> Callable[[], None]:
    """Gathers what the run needs, before it has a folder; returns the run."""
    from kdkernels.api.distill import lm_models
    from kdkernels.api.distill.lm_pipeline import LmPipeline, load_blocks, open_cache

    teacher, tokenizer = lm_models.load_causal_lm(config.model, display.note)
    lm_models.check_layers(teacher, config.layers)
    vocab = len(lm_models.head_of(teacher).weight)
    require(config.top_k <= vocab, "top-k", f"be at most {vocab}, the classes", config.top_k)
    longest = getattr(teacher.config, "max_position_embeddings", config.seq_len)
    contract = f"be at most {longest} for this teacher"
    require(config.seq_len <= longest, "seq-len", contract, config.seq_len)
    lm_models.check_head(teacher, "model")
    if config.cache is not None:
        open_cache(config, Path(config.cache), teacher, tokenizer)  # refuses one that does not fit
    blocks = load_blocks(config, tokenizer, display)
    return LmPipeline(config, folder, runtime, display, teacher, tokenizer, blocks).run


def prepare_swa(
    config: SwaConfig, folder: RunFolder, runtime: Runtime, display: Display
) -> Callable[[], None]:
    """Gathers what the run needs, before it has a folder; returns the run."""
    from kdkernels.api.distill.swa_pipeline import SwaPipeline, make_task

    task = make_task(config, runtime, display.note)
    return SwaPipeline(config, folder, runtime, display, task).run


def prepare_diito(
    config: DiitoConfig, folder: RunFolder, runtime: Runtime, display: Display
) -> Callable[[], None]:
    """Gathers what the run needs, before it has a folder; returns the run."""
    from kdkernels.api.distill.diito_pipeline import DiitoPipeline, make_task

    task = make_task(config, runtime, display.note)
    if not config.teacher_epochs:
        check_trained(task)
    depth = models.read_config(task.options.model, "model").num_hidden_layers
    alignment = config.aligned(depth)
    depths = (alignment.teacher_layers, alignment.student_layers)
    contract = f"be for {depth} and {len(config.student_layers)} layers of teacher and student"
    fits = depths == (depth, len(config.student_layers))
    require(fits, "alignment", contract, f"{depths[0]} and {depths[1]} in {config.alignment}")
    return DiitoPipeline(config, folder, runtime, display, task).run


def prepare_stark(
    config: StarkConfig, folder: RunFolder, runtime: Runtime, display: Display
) -> Callable[[], None]:
    """Gathers what the run needs, before it has a folder; returns the run."""
    from kdkernels.api.distill.stark_pipeline import StarkPipeline, make_task
    from kdkernels.api.methods.structure import layers_of

    task = make_task(config, runtime, display.note)
    if not config.teacher_epochs:
        check_trained(task)
    path = task.options.model
    if config.student_kind == "dropped":
        models.check_layers(
            models.read_config(path, "model"), config.student_layers, "student-layers", "model"
        )
    try:
        layers_of("SparseTeacher", models.empty_classifier(path, "model"))
    except ValueError as error:
        raise DistillError(f"model must be one that can be cut, got {path}: {error}") from error
    return StarkPipeline(config, folder, runtime, display, task).run


def prepare_meta_kd(
    config: MetaKdConfig, folder: RunFolder, runtime: Runtime, display: Display
) -> Callable[[], None]:
    """Gathers what the run needs, before it has a folder; returns the run."""
    from kdkernels.api.distill.metakd_pipeline import MetaKdPipeline, load_corpora

    corpora = load_corpora(config, display.note)
    model = fetch.teacher_folder(display.note) if config.model is None else Path(config.model)
    models.check_model_folder(model, "model", config.max_length)
    models.check_student_layers(model, config.student_layers)
    pipeline = MetaKdPipeline(config, folder, runtime, display, corpora, model)
    pipeline.check_teachers()
    return pipeline.run


# What makes a run of each kind of configuration ready.
PREPARE: dict[type[RunConfig], Callable[..., Callable[[], None]]] = {
    DistillConfig: prepare_classification,
    LmConfig: prepare_lm,
    SwaConfig: prepare_swa,
    FinetuneConfig: prepare_swa,
    DiitoConfig: prepare_diito,
    StarkConfig: prepare_stark,
    MetaKdConfig: prepare_meta_kd,
}


def check_trained(task: Any) -> None:
    """Raises unless the model of a task has its head already: a new one would teach nothing."""
    path, names = task.options.model, task.heading.label_names
    if names:
        found = models.trained_label_names(path)
        contract = f"have the labels {list(names)} in this order if teacher-epochs is 0"
        classes = models.read_config(path, "model").num_labels
        fits = found == list(names) or (found is None and classes == len(names))
        require(fits, "model", contract, found or f"{classes} without names")
        return
    kinds = models.read_config(path, "model").architectures or []
    trained = any(kind.endswith("ForMaskedLM") for kind in kinds)
    contract = "be a saved masked language model if teacher-epochs is 0"
    require(trained, "model", contract, kinds)


def quiet_transformers() -> None:
    """Keeps transformers from reaching for a network and from talking over the progress bars."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def open_config(given: Mapping[str, Any], resume: bool) -> RunConfig:
    """The configuration of the run; what is on disk must fit what the user asks for."""
    if not resume:
        config = configs.make_config(given)
        contract = "name a run that does not exist yet (--resume continues one)"
        require(not config.folder.exists(), "name", contract, config.folder)
        return config
    kind = configs.config_class(given.get("objective", DistillConfig.objective))
    name = given.get("name", kind.presets(given).get("name", kind.name))
    out = given.get("out", kind.out)
    folder = RunFolder(Path(out) / name)
    require(folder.path.is_dir(), "resume", "continue a run that exists", folder.path)
    if not folder.config_file.is_file():
        return configs.make_config(given)  # killed before it had begun
    stored = configs.from_yaml(folder.config_file.read_text(encoding="utf-8"))
    configs.check_same(stored, given)
    stored.validate()
    return dataclasses.replace(stored, name=name, out=out)


class Placed(Protocol):
    """A configuration that says where and in which precision to compute."""

    @property
    def device(self) -> str:
        """One of ``DEVICES``."""

    @property
    def precision(self) -> str:
        """One of ``PRECISIONS``."""


def choose_runtime(config: Placed) -> Runtime:
    """Device and precision: bf16 where the processor computes in it, fp32 elsewhere."""
    cuda = torch.cuda.is_available()
    require(cuda or config.device != "cuda", "device", "be available", "cuda without a usable GPU")
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    if config.precision != "auto":
        return Runtime(device, config.precision == "bf16")
    if device.type == "cuda":
        return Runtime(device, torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return Runtime(device, bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")))


def check_models(config: DistillConfig, teacher: Path) -> None:
    """Raises for models that cannot work, before a run's folder is made for them."""
    models.check_model_folder(teacher, "teacher", config.max_length)
    if config.student is not None:
        models.check_model_folder(Path(config.student), "student", config.max_length)
    else:
        models.check_student_layers(teacher, config.student_layers)


def match_labels(config: DistillConfig, teacher: Path, corpus: Corpus) -> Corpus:
    """Numbers the classes as a teacher does that is used as it is."""
    if config.teacher_epochs:
        return corpus
    names = models.trained_label_names(teacher)
    if names is None:
        return corpus
    contract = f"have the teacher's labels {names}"
    require(sorted(names) == sorted(corpus.label_names), "data", contract, corpus.label_names)
    return corpus.relabelled(names)


def load_corpus(config: DistillConfig, display: Display) -> Corpus:
    """The user's data, or the demo's."""
    limits = Limits(config.labels, config.transfer, config.test, exact=not config.quick)
    if config.data is not None:
        return load_own(Path(config.data), limits)
    return load_sentiment(fetch.fetch(fetch.SENTIMENT, display.note), limits)
