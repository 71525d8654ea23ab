"""A Trainer that distils: plain, or with that of TRL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from kdkernels.api.cache import TeacherCache
from kdkernels.api.capture import Capture
from kdkernels.api.hf import head as heads
from kdkernels.api.hf.hidden import HiddenTerm, token_count, token_mask
from kdkernels.api.hf.losses import Loss, StudentLoss
from kdkernels.api.hf.metrics import PartSums
from kdkernels.api.hf.options import DistillOptions
from kdkernels.api.hf.teacher import CachedTeacher, Signals, Teacher, prepare_teacher

__all__ = ["DistillMixin", "DistillTrainer", "last_checkpoint"]

NAME = "DistillMixin"
STATE = "trainer_state.json"  # the last file of a checkpoint

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # the Trainer comes behind the mixin


class DistillMixin(_Trainer):
    r"""Distillation for any Trainer: ``class MyTrainer(DistillMixin, Trainer | SFTTrainer)``.

    The loss is that of :class:`DistillOptions`. For language models it comes from hidden states and
    heads: logits exist for a chunk of tokens at a time, of either model. The student's forward pass
    goes through all of its wrappers; its head, which is all that is left out, hands over what it
    gets. Counts are those of the Trainer: the sum over the tokens of all micro-batches and
    processes, divided once.

    Args:
        model: the student, as for the Trainer, like all other arguments.
        args: as for the Trainer; where they hold :class:`DistillOptions`
            (:class:`DistillArguments`), these count.
        teacher: a model of transformers, which is frozen and put on the student's device; what
            :func:`prepare_teacher` returns; a :class:`kdkernels.TeacherCache`; None for
            cross-entropy alone, without logits in memory.
        distill: the options, where ``args`` have none.

    Raises:
        TypeError: a teacher of a wrong type.
        ValueError: options, models or a Trainer that do not go together; the message says what to
            do.

    Note:
        Logs have ``kd_loss``, ``ce_loss`` and ``hidden_loss`` beside ``loss``, evaluations
        ``eval_kd_loss`` and so on, over all tokens of the data set. Checkpoints hold the student;
        projections of hidden states are in a file of their own beside it. See the README of
        ``kdkernels.hf``.

    Example:
        >>> import tempfile, torch, transformers
        >>> from kdkernels.api.hf import DistillArguments, DistillTrainer
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> def model(layers):
        ...     config = transformers.LlamaConfig(vocab_size=9, num_hidden_layers=layers, **sizes)
        ...     return transformers.LlamaForCausalLM(config)
        >>> texts = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 4
        >>> arguments = DistillArguments(
        ...     tempfile.mkdtemp(), temperature=2.0, max_steps=1, report_to=[], use_cpu=True,
        ...     disable_tqdm=True,
        ... )
        >>> trainer = DistillTrainer(model(1), arguments, teacher=model(2), train_dataset=texts)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime'...
        1
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        teacher: Any = None,
        distill: DistillOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, *rest, **kwargs)
        self.model: Any
        self.distill = _options(self.args, distill)
        _check_trainer(self)
        # Rows are counted whatever the student's forward pass takes: the loss is not its own.
        self.model_accepts_loss_kwargs = True
        self._teacher = _teacher(teacher, self.accelerator, self.distill)
        self._loss = StudentLoss(self.model, self._teacher, self.distill)
        self._loss_shifts_labels = self._loss.shifts  # so are they counted
        self._hidden: HiddenTerm | None = None
        if self.distill.hidden_weight:
            self._hidden = _hidden_term(self, self._teacher)
            self._captured = Capture(self.model, self._hidden.student_paths)
            if self._hidden.projections is not None:
                self._hidden.projections.to(self.args.device)
                self.add_callback(_ZeroProjections(self._hidden))
        self._token_count: Tensor | None = None
        self._loss_only = False
        self._parts, self._eval_parts = PartSums(), PartSums()
        self._logged_at = 0

    # ---- the loss --------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch, divided as the Trainer expects it.

        Args:
            model: the student, as it is wrapped.
            inputs: the batch; it is left as it is.
            return_outputs: return the model's outputs as well, with logits.
            num_items_in_batch: rows with labels in all micro-batches of the step.

        Returns:
            The loss, or the loss and the outputs.
        """
        whole_logits = return_outputs and not self._loss_only
        given = self._loss.inputs(self.model, inputs)
        self._loss.check(model, given)
        signals = self._signals(given, inputs)
        with ExitStack() as stack:
            if self._hidden is not None:
                stack.enter_context(self._captured)
            found, outputs = self._loss(
                model, given, inputs, signals, num_items_in_batch, whole_logits
            )
        loss = found.loss
        named = {"kd_loss": found.kd, "ce_loss": found.ce}
        parts = {name: value for name, value in named.items() if value is not None}
        # A mean that is not divided by the rows of the step is one of this micro-batch.
        counted = num_items_in_batch is not None
        self.loss_is_scaled_for_ga = counted
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if model.training else 1
        factor = self._processes() if counted else 1
        loss = loss * factor
        # Means of a micro-batch, which DistributedDataParallel averages over processes.
        share = 1.0 / steps if counted else 1.0
        aux = self._aux_loss(outputs)
        if aux is not None:
            loss = loss + aux * share
        if self._hidden is not None:
            count = self._token_count if counted and model.training else None
            of_layers = self._hidden(self._captured, signals.layers, token_mask(given), count)
            of_layers = of_layers * (share if count is None else self._processes())
            loss = loss + of_layers
            parts["hidden_loss"] = of_layers
            self._captured.clear()
        self._record(model, found, parts, factor, 1.0 if counted else 1.0 / steps)
        return (loss, outputs) if return_outputs else loss

    def _signals(self, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> Signals:
        """What the teacher says about the batch."""
        if self._teacher is None:
            return Signals()
        if isinstance(self._teacher, CachedTeacher):
            return self._teacher(inputs)
        layers = () if self._hidden is None else self._hidden.teacher_paths
        return self._teacher(given, route=self._loss.route, layers=layers)

    def _processes(self) -> int:
        """What makes a sum over the rows here, divided by those of all processes, a mean that
        DistributedDataParallel may average again.
        """
        if not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes) // self._same_batch()

    def _same_batch(self) -> int:
        """How many processes have each batch."""
        return int(getattr(self, "get_tp_size", lambda: 1)())

    def _aux_loss(self, outputs: Any) -> Tensor | None:
        """The load-balancing loss of a mixture of experts, where the model computes it."""
        aux = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        if aux is None:
            return None
        config: Any = heads.core(self.model).config
        coefficient: float = getattr(config, "router_aux_loss_coef", 0.0)
        weighted: Tensor = coefficient * aux
        return weighted

    def _record(
        self, model: nn.Module, found: Loss, parts: dict[str, Tensor], factor: int, share: float
    ) -> None:
        """Keeps the parts for the logs."""
        if not model.training:
            for name, value in parts.items():
                if name == "hidden_loss":
                    self._eval_parts.add(name, value)
                else:
                    self._eval_parts.add(name, value * found.denominator)
            self._eval_parts.add("batches", torch.ones((), device=found.loss.device))
            self._eval_parts.add("rows", found.n_valid)
            return
        if not self._parts:
            self._logged_at = self.state.global_step
        for name, value in parts.items():
            scale = share if name == "hidden_loss" else factor * share
            self._parts.add(name, value * scale)

    # ---- what the Trainer calls ------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Also counts the tokens of the step, which the hidden-state term is divided by."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._token_count = None
        if self._hidden is not None and batches:
            device = self.args.device
            tokens = torch.stack([token_count(batch).to(device) for batch in batches]).sum()
            if self._processes() > 1:
                tokens = self.accelerator.gather(tokens).sum() // self._same_batch()
            self._token_count = tokens
        return batches, count

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Also averages the projections' gradients over processes."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._hidden is not None and self.accelerator.sync_gradients:
            self._hidden.average_gradients()
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Without logits where the loss is all that is wanted."""
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Also reports the parts of the loss, the means over all rows."""
        self._eval_parts = PartSums()
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        sums = self._eval_parts.take(self.accelerator)
        rows, batches = sums.pop("rows", 0.0), sums.pop("batches", 0.0)
        for name, total in sums.items():
            count = batches if name == "hidden_loss" else rows
            output.metrics[f"{prefix}_{name}"] = total / max(count, 1.0)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss to what is logged of the training."""
        if "loss" in logs and "learning_rate" in logs:
            steps = max(self.state.global_step - self._logged_at, 1)
            for name, total in self._parts.take(self.accelerator).items():
                logs[name] = total / steps / self.accelerator.num_processes
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """With the projections' parameters."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._hidden is not None and self._hidden.projections is not None:
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            new = [p for p in self._hidden.projections.parameters() if id(p) not in known]
            if new:
                decay = self.args.weight_decay
                optimizer.add_param_group({"params": new, "weight_decay": decay})
        return optimizer

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; ``True`` resumes from the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            output: Any = self.args.output_dir
            resume_from_checkpoint = last_checkpoint(output)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{NAME}: resume_from_checkpoint must not be True without a complete "
                    f"checkpoint, got {output}"
                )
        if resume_from_checkpoint and self._hidden is not None:
            self._hidden.load(resume_from_checkpoint)
        self._parts = PartSums()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        """The student; into checkpoints also the projections, in a file of their own."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self._hidden is not None and self.args.should_save:
            folder: Any = output_dir or self.args.output_dir
            self._hidden.save(folder)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if isinstance(self._teacher, CachedTeacher):
            columns: Any = self._signature_columns
            if CachedTeacher.IDS not in columns:
                columns.append(CachedTeacher.IDS)


class DistillTrainer(DistillMixin, Trainer):
    """transformers' ``Trainer`` that distils; see :class:`DistillMixin`."""


class _ZeroProjections(TrainerCallback):
    """The Trainer clears the gradients of its model only."""

    def __init__(self, term: HiddenTerm) -> None:
        self._term = term

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each step."""
        if self._term.projections is not None:
            self._term.projections.zero_grad(set_to_none=True)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The last checkpoint of a folder that was written to its end; None where there is none.

    A training that is killed while it writes leaves part of a checkpoint, which transformers would
    resume from.
    """
    folder = Path(output_dir)
    found = (path.parent for path in folder.glob(f"checkpoint-*/{STATE}"))
    steps = {path.name.rpartition("-")[2]: path for path in found}
    numbers = [int(step) for step in steps if step.isdigit()]
    return str(steps[str(max(numbers))]) if numbers else None


def _options(args: Any, distill: DistillOptions | None) -> DistillOptions:
    own = isinstance(args, DistillOptions)
    if distill is None:
        return args if own else DistillOptions()
    if own:
        raise ValueError(f"{NAME}: distill must not be given with args that are DistillOptions")
    if not isinstance(distill, DistillOptions):
        raise TypeError(f"{NAME}: distill must be DistillOptions, got {type(distill).__name__}")
    return distill


def _check_trainer(trainer: Any) -> None:
    """Raises for what would not be heeded."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{NAME}: args must give one GPU a process, got {trainer.args.n_gpu} (DataParallel): "
            "start it with torchrun or accelerate launch"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(f"{NAME}: compute_loss_func must not be given, the loss is distill's")
    if trainer.args.label_smoothing_factor:
        raise ValueError(
            f"{NAME}: label_smoothing_factor must be 0, got {trainer.args.label_smoothing_factor}; "
            "use smoothing of DistillOptions"
        )
    config = getattr(trainer.accelerator, "parallelism_config", None)
    if config is not None and (config.cp_enabled or config.sp_enabled):
        raise ValueError(f"{NAME}: args must not divide sequences over processes (cp, sp)")


def _teacher(
    teacher: Any, accelerator: Any, options: DistillOptions
) -> Teacher | CachedTeacher | None:
    if teacher is None or isinstance(teacher, Teacher | CachedTeacher):
        return teacher
    if isinstance(teacher, TeacherCache):
        return CachedTeacher(teacher, options.temperature)
    if isinstance(teacher, nn.Module):
        return prepare_teacher(teacher, accelerator)
    raise TypeError(
        f"{NAME}: teacher must be a model, what prepare_teacher returns or a TeacherCache, got "
        f"{type(teacher).__name__}"
    )


def _hidden_term(trainer: Any, teacher: Teacher | CachedTeacher | None) -> HiddenTerm:
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"{NAME}: hidden_weight must be 0 without a live teacher, got "
            f"{trainer.distill.hidden_weight}"
        )
    term = HiddenTerm(trainer.model, teacher.model, trainer.distill, trainer.args.seed)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if term.projections is not None and sharded:
        raise ValueError(
            f"{NAME}: hidden_weight must be 0 for models of other widths under FSDP and DeepSpeed, "
            "whose optimizers know the student's parameters only"
        )
    return term
