"""The k likeliest classes of every row, their log-probabilities, and the mass of the others."""

import importlib.util

from kdkernels.ops.topk_logprobs.op import linear_topk_logprobs, topk_logprobs, unsupported
from kdkernels.ops.topk_logprobs.spec import Spec

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.topk_logprobs import triton_launch as _triton_launch  # noqa: F401

__all__ = ["Spec", "linear_topk_logprobs", "topk_logprobs", "unsupported"]
