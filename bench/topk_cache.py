"""What the teacher cache costs and loses: bytes an entry, rows a second, error of the KL.

``python -m kdkernels.bench.topk_cache`` draws its distributions; ``--model smollm2-135m --data
wikitext-2`` takes those of a real model, and as student the same model with noise on its weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from kdkernels.api.cache import TopKCodec

SIZES = ((151936, 64), (151936, 32), (49152, 64), (49152, 32), (128256, 64))
LOGIT_NOISE = (0.1, 0.3, 0.6, 1.0)
WEIGHT_NOISE = (0.01, 0.03, 0.1)


def peaked_logits(rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Logits as language models give them: Zipf's law with an exponent of 0.9 to 3, noise, and a
    favourite. The probability of the first token is between 0.1 and 0.997 in nine rows of ten.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, 1, generator=generator)

    ranks = torch.arange(1, vocab + 1)
    logits = -uniform(0.9, 3.0) * torch.log(ranks + uniform(0.0, 3.0))
    logits += uniform(0.2, 1.0) * torch.randn(rows, vocab, generator=generator)
    logits[:, :1] -= 2.0 * torch.log(uniform(1e-6, 1.0))
    return logits


def bucket_kl(ids: Tensor, logprobs: Tensor, student_logits: Tensor) -> Tensor:
    """KL of the student to stored rows, in float64; all other classes are one more, the tail."""
    student = student_logits.double().log_softmax(-1).gather(-1, ids)
    stored = logprobs.double()
    tail = (1.0 - stored.exp().sum(-1)).clamp(min=1e-12)
    student_tail = (1.0 - student.exp().sum(-1)).clamp(min=1e-12)
    own = (stored.exp() * (stored - student)).sum(-1)
    return own + tail * (tail.log() - student_tail.log())


def kl_pair(teacher_logits: Tensor, student_logits: Tensor, k: int, bits: int) -> list[Tensor]:
    """KL of each row from the teacher's own top-k, and from what a cache makes of it."""
    logprobs, ids = teacher_logits.double().log_softmax(-1).topk(k)
    codec = TopKCodec(k, teacher_logits.shape[-1], bits)
    rows = ((ids, logprobs), codec.decode(codec.encode(ids, logprobs)))
    return [bucket_kl(*row, student_logits) for row in rows]


def drawn_pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    """A teacher, and students with Gaussian noise on its logits."""
    generator = torch.Generator().manual_seed(0)
    teacher = peaked_logits(1000, 49152, generator)
    for noise in LOGIT_NOISE:
        student = teacher + noise * torch.randn(teacher.shape, generator=generator)
        yield f"logits + {noise} noise", teacher, student


@torch.inference_mode()
def model_pairs(model: str, data: str, tokens: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A model on text, and the same model with relative Gaussian noise on its weights."""
    from kdkernels.api.distill.lm_data import lm_blocks
    from kdkernels.api.distill.lm_models import load_causal_lm
    from kdkernels.api.distill.runner import quiet_transformers

    quiet_transformers()
    teacher, tokenizer = load_causal_lm(model)
    blocks = lm_blocks(data, tokenizer, "test", 256, tokens)
    batch = torch.stack([block for _, block in blocks])
    logits = teacher(input_ids=batch).logits.flatten(0, 1)
    torch.manual_seed(0)
    for noise in WEIGHT_NOISE:
        student = copy.deepcopy(teacher)
        for weight in student.parameters():
            weight.mul_(1.0 + noise * torch.randn_like(weight))
        yield (
            f"weights x (1 + {noise} noise)",
            logits,
            student(input_ids=batch).logits.flatten(0, 1),
        )


def speed(k: int, vocab: int, bits: int, rows: int = 20000) -> tuple[float, float]:
    """Rows encoded and decoded a second, one thread, median of five."""
    generator = torch.Generator().manual_seed(0)
    logprobs, ids = peaked_logits(200, vocab, generator).log_softmax(-1).topk(k)
    ids, logprobs = (x.repeat(rows // 200, 1) for x in (ids, logprobs))
    codec = TopKCodec(k, vocab, bits)
    packed = codec.encode(ids, logprobs)
    times = []
    for run in (lambda: codec.encode(ids, logprobs), lambda: codec.decode(packed)):
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        times.append(statistics.median(taken))
    return rows / times[0], rows / times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--data", default="wikitext-2")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    for vocab, k in SIZES:
        size = TopKCodec(k, vocab, options.bits).row_bytes
        print(f"vocabulary {vocab}, k {k}: {size} bytes a row, {size / k:.2f} an entry")
    encoded, decoded = speed(options.k, 151936, options.bits)
    print(
        f"k {options.k}: {encoded:,.0f} rows a second encoded, {decoded:,.0f} decoded, one thread"
    )
    pairs = (
        model_pairs(options.model, options.data, options.tokens) if options.model else drawn_pairs()
    )
    for name, teacher, student in pairs:
        exact, stored = kl_pair(teacher, student, options.k, options.bits)
        error = (stored - exact).abs() / exact
        print(
            f"{name}: KL {exact.mean():.4f}; error of a row: mean {error.mean():.3%}, 99th "
            f"percentile {error.quantile(0.99):.2%}; of the mean over all rows: "
            f"{(stored.mean() / exact.mean() - 1).abs():.3%}"
        )


if __name__ == "__main__":
    main()
