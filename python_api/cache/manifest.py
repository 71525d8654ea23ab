"""What a cache holds, and whether that is what the reader wants."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from kdkernels.api._spec import positive

FORMAT = 1
FILE = "manifest.json"
SHIFTS = {0: "row t scores token t", 1: "row t is the prediction of token t + 1"}


@dataclass(frozen=True)
class Manifest:
    """What the rows of a cache are.

    Attributes:
        vocab_size: Number of classes of the teacher's logits.
        k: Entries a row.
        temperature: The log-probabilities are of ``logits / temperature``.
        shift: 0: row t scores token t. 1: row t is the prediction of token t + 1.
        bits: Bits of a log-probability.
        tokenizer_hash: :func:`tokenizer_hash` of the tokenizer; None where none was given.
        teacher: Name of the teacher; None where none was given.
        format: Version of the files.
    """

    vocab_size: int
    k: int
    temperature: float
    shift: int
    bits: int
    tokenizer_hash: str | None = None
    teacher: str | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def fingerprint(self) -> str:
        """Tells the shards of one cache from those of another."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def require(self, caller: str, path: Path, wanted: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` for the first wanted value that differs from the stored one."""
        for name, value in wanted.items():
            stored = getattr(self, name)
            if value != stored:
                raise ValueError(
                    f"{caller}: {name} must be {stored!r}, which is stored in {path}, got {value!r}"
                )


def check(caller: str, manifest: Manifest) -> None:
    """Raises unless the values are possible ones; k, vocab_size and bits the codec checks."""
    positive(caller, "temperature", manifest.temperature)
    if isinstance(manifest.shift, bool) or manifest.shift not in SHIFTS:
        raise ValueError(f"{caller}: shift must be 0 or 1, got {manifest.shift!r}")
    if not isinstance(manifest.teacher, str | None):
        raise TypeError(f"{caller}: teacher must be a name, got {type(manifest.teacher).__name__}")


def read_manifest(caller: str, folder: Path) -> Manifest:
    """Reads ``manifest.json``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another version of the format.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{caller}: path must be a teacher cache, got {folder} without {FILE}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{caller}: {path} must be JSON, got: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise ValueError(f"{caller}: {path} must have format {FORMAT}, got {found!r}")
    hints = get_type_hints(Manifest)
    if set(values) != set(hints):
        raise ValueError(f"{caller}: {path} must hold {sorted(hints)}, got {sorted(values)}")
    for name, hint in hints.items():
        if not isinstance(values[name], hint):
            raise ValueError(f"{caller}: {path} must hold a valid {name}, got {values[name]!r}")
    return Manifest(**values)


def tokenizer_hash(tokenizer: Any) -> str:
    """Tells whether two tokenizers mean the same tokens by the same ids.

    Args:
        tokenizer: anything with ``get_vocab()`` (Hugging Face), or the mapping of tokens to ids.

    Returns:
        The sha256, in hex, of the vocabulary in the order of its ids.

    Example:
        >>> from kdkernels.api.cache import tokenizer_hash
        >>> tokenizer_hash({"a": 0, "b": 1}) == tokenizer_hash({"b": 1, "a": 0})
        True
    """
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer
    if not isinstance(vocabulary, Mapping):
        raise TypeError(
            "tokenizer_hash: tokenizer must have get_vocab() or be a mapping of tokens to ids, "
            f"got {type(tokenizer).__name__}"
        )
    listed = sorted((int(number), str(token)) for token, number in vocabulary.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def resolve_tokenizer(tokenizer: Any) -> str:
    """The hash of a tokenizer; a string is taken for the hash itself."""
    return tokenizer if isinstance(tokenizer, str) else tokenizer_hash(tokenizer)


def content_hash(caller: str, input_ids: Any) -> bytes:
    """16 bytes that stand for a sequence of tokens.

    Raises:
        ValueError: ``input_ids`` is no sequence of integers, or an empty one.
    """
    tokens = torch.as_tensor(input_ids)
    if tokens.dim() != 1 or tokens.numel() == 0:
        raise ValueError(
            f"{caller}: input_ids must be [tokens], at least one, got shape {list(tokens.shape)}"
        )
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{caller}: input_ids must be integers, got {tokens.dtype}")
    raw = tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False)
    return hashlib.blake2b(raw.tobytes(), digest_size=16).digest()
