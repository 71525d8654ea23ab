"""Hidden states of a base run with spans, or positions, of a source run in their place."""

import importlib.util

from kdkernels.ops.interchange.index import check_pairs, check_spans, map_of_pairs
from kdkernels.ops.interchange.op import Mode, interchange, unsupported

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.interchange import triton_launch as _triton_launch  # noqa: F401

__all__ = ["Mode", "check_pairs", "check_spans", "interchange", "map_of_pairs", "unsupported"]
