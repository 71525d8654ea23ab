"""Store what a causal language model says once, and train a student from the files.

python examples/offline_cache.py            # SmolLM2-135M on WikiText-2, downloaded once
python examples/offline_cache.py --quick    # on 1,024 tokens
python examples/offline_cache.py --model DIR --data FILE.txt
"""

import argparse
from pathlib import Path

import torch

import kdkernels
from kdkernels.api.distill import lm_data, lm_models

K, TEMPERATURE, BATCH = 64, 2.0, 4


def write_cache(folder, teacher, tokenizer, blocks):
    """Runs the teacher over what the cache lacks: after a kill the same command goes on."""
    vocab_size = teacher.get_output_embeddings().weight.shape[0]
    with kdkernels.TeacherCacheWriter(
        folder, k=K, vocab_size=vocab_size, temperature=TEMPERATURE, tokenizer=tokenizer
    ) as writer:
        missing = [block for block in blocks if not writer.done(*block)]
        for name, tokens in missing:
            with torch.inference_mode():
                logits = teacher(input_ids=tokens[None]).logits[0]
            top = kdkernels.topk_logprobs(logits, K, temperature=TEMPERATURE)
            writer.add(name, tokens, top.ids, top.logprobs)
    print(f"cache: {len(missing)} of {len(blocks)} blocks written")
    return kdkernels.TeacherCache(
        folder, tokenizer=tokenizer, vocab_size=vocab_size, k=K, temperature=TEMPERATURE
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a transformers folder")
    parser.add_argument("--data", default="wikitext-2", help="a text file")
    parser.add_argument("--cache", type=Path, default=Path("teacher-cache"))
    parser.add_argument("--layers", type=int, default=4, help="of the teacher, for the student")
    parser.add_argument("--quick", action="store_true", help="1,024 tokens, one epoch")
    args = parser.parse_args()
    tokens, epochs = (1024, 1) if args.quick else (16384, 2)
    torch.manual_seed(0)
    teacher, tokenizer = lm_models.load_causal_lm(args.model, print)
    blocks = lm_data.lm_blocks(args.data, tokenizer, "train", 64, tokens, print)
    student = lm_models.make_student(teacher.eval(), args.layers)
    cache = write_cache(args.cache, teacher, tokenizer, blocks)
    del teacher  # the files are all that the student learns from
    optimizer = torch.optim.AdamW(student.requires_grad_(True).parameters(), lr=1e-3)
    for epoch in range(epochs):
        for rows in torch.randperm(len(blocks)).split(BATCH):
            batch = [blocks[row] for row in rows.tolist()]
            ids, logprobs = cache.rows(batch)
            inputs = torch.stack([tokens for _, tokens in batch])
            parts = kdkernels.topk_kd_loss(
                student(input_ids=inputs).logits, ids, logprobs, inputs, temperature=TEMPERATURE,
                alpha=0.5, shift=1, return_parts=True,
            )  # fmt: skip
            parts.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: KL {parts.kd:.3f}, cross-entropy {parts.ce:.3f}")


if __name__ == "__main__":
    main()
