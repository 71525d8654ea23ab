"""Launches the Triton kernels of ``topk_logprobs``."""

from kdkernels.ops.topk_logprobs.op import topk_logprobs_rows


@topk_logprobs_rows.launcher("triton")
def topk_logprobs_triton(x, k, spec):
    raise NotImplementedError
