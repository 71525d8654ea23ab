"""Rows of a top-k teacher as bytes, and back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kdkernels import _native


class TopKCodec:
    r"""Packs ids and log-probabilities of a teacher's top-k into a fixed number of bytes a row.

    Ids are stored exactly (Elias-Fano, about ``2 + log2(vocab / k)`` bits each), log-probabilities
    in ``bits`` bits, uniform between the row's largest and smallest, and 4 more bits for the
    quarter of the entries that are largest. A decoded row has the probability mass of the encoded
    one, and never more than 1. Log-probabilities below -100 become ``-inf``.

    Args:
        k: entries a row, in [1, 65535] and at most ``vocab_size``.
        vocab_size: ids are in ``[0, vocab_size)``.
        bits: bits of a log-probability, in [4, 16].

    Raises:
        ValueError: a number out of range.
        NotImplementedError: kdkernels was installed without its compiled code.

    Example:
        >>> import torch
        >>> from kdkernels.api.cache import TopKCodec
        >>> codec = TopKCodec(k=2, vocab_size=100)
        >>> packed = codec.encode(torch.tensor([[7, 42]]), torch.tensor([[0.75, 0.125]]).log())
        >>> packed.shape[1] == codec.row_bytes
        True
        >>> ids, logprobs = codec.decode(packed)
        >>> ids.tolist(), [round(p, 3) for p in logprobs.exp()[0].tolist()]
        ([[7, 42]], [0.75, 0.125])
    """

    def __init__(self, k: int, vocab_size: int, bits: int = 8) -> None:
        self.k, self.vocab_size, self.bits = k, vocab_size, bits
        for name in ("k", "vocab_size", "bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"TopKCodec: {name} must be an integer, got {value!r}")
        self.row_bytes: int = _host().topk_row_bytes(k, vocab_size, bits)

    def encode(self, ids: Any, logprobs: Any) -> Any:
        """Packs rows.

        Args:
            ids: ``[rows, k]`` integers, in any order; -1 is an entry that is not there.
            logprobs: ``[rows, k]`` floating-point; ``-inf`` where the id is -1.

        Returns:
            A NumPy array ``[rows, row_bytes]`` of uint8.

        Raises:
            ValueError: ids out of range or twice in a row, NaN, probabilities that sum to more
                than 1; the message names the row.
        """
        ids, logprobs = torch.as_tensor(ids), torch.as_tensor(logprobs)
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise TypeError(f"TopKCodec: ids must be integers, got {ids.dtype}")
        if not logprobs.dtype.is_floating_point:
            raise TypeError(f"TopKCodec: logprobs must be floating-point, got {logprobs.dtype}")
        arrays = (
            x.detach().to("cpu", dtype).contiguous().numpy()
            for x, dtype in ((ids, torch.int64), (logprobs, torch.float32))
        )
        return _host().topk_encode(*arrays, self.k, self.vocab_size, self.bits)

    def decode(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Unpacks rows.

        Args:
            rows: ``[rows, row_bytes]``, a NumPy array of uint8; a row of zeros is one of padding.

        Returns:
            ``ids`` ``[rows, k]`` int64 and ``logprobs`` ``[rows, k]`` float32, the largest first;
            entries that are not there come last, with id -1 and ``-inf``.

        Raises:
            ValueError: bytes that :meth:`encode` cannot have made.
        """
        import numpy

        rows = numpy.ascontiguousarray(rows)
        if rows.dtype != numpy.uint8:
            raise TypeError(f"TopKCodec: rows must be uint8, got {rows.dtype}")
        ids, logprobs = _host().topk_decode(rows, self.k, self.vocab_size, self.bits)
        return torch.from_numpy(ids), torch.from_numpy(logprobs)


def estimate_bytes(rows: int, k: int, vocab_size: int, bits: int = 8) -> int:
    """Bytes that so many rows will take on disk.

    Exact for the rows themselves; a shard adds about 50 bytes for each example.

    Args:
        rows: number of token positions.
        k: entries a row.
        vocab_size: size of the teacher's vocabulary.
        bits: bits of a log-probability.

    Example:
        >>> from kdkernels.api.cache import estimate_bytes
        >>> estimate_bytes(1_000_000, k=64, vocab_size=151936)
        186000000
    """
    return rows * TopKCodec(k, vocab_size, bits).row_bytes


def _host() -> ModuleType:
    module = _native.host()
    if module is None:
        raise NotImplementedError(
            "TopKCodec: kdkernels must be installed with its compiled code, got none "
            "(KDKERNELS_NATIVE=off, or no compiler at install time)"
        )
    return module
