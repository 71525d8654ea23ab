"""Distils the first layers of SmolLM2-135M on WikiText-2 with FSDP2; run it again to go on:

torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py [--tiny] [--steps 4] [--folder runs/fsdp2]
--tiny: a random model, no network. On GPUs by nccl (not yet run on any), else by gloo.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import kdkernels
from kdkernels.api.distill import lm_data, lm_models


def load(tiny):
    if tiny:
        torch.manual_seed(0)
        sizes = dict(vocab_size=101, hidden_size=64, intermediate_size=64, num_hidden_layers=3)
        return LlamaForCausalLM(LlamaConfig(**sizes)), torch.randint(101, (64, 64))
    model, tokenizer = lm_models.load_causal_lm("smollm2-135m", print)
    blocks = lm_data.lm_blocks("wikitext-2", tokenizer, "train", 64, max_tokens=20_000)
    return model, torch.stack([tokens for _, tokens in blocks])


def sharded(model, device):
    [fully_shard(layer) for layer in model.to(device).model.layers]
    return fully_shard(model)


def states_and_head(model, tokens):
    """What the head gets, and its weight; of the logits only the last position's are computed."""
    out = model(tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    return out.hidden_states[-1], kdkernels.parallel.gathered(model.lm_head).weight


def loss_of(student, teacher, tokens, count=None):
    with torch.no_grad():
        target = states_and_head(teacher, tokens)
    given = *states_and_head(student, tokens), *target, tokens
    return kdkernels.linear_kd_loss(*given, shift=1, temperature=2.0, num_items_in_batch=count)


parser = argparse.ArgumentParser()
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--folder", type=Path, default=Path("runs/fsdp2"))
args = parser.parse_args()
device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
dist.init_process_group("gloo" if device == "cpu" else "nccl")
rank, world = dist.get_rank(), dist.get_world_size()
say = partial(print, flush=True) if rank == 0 else (lambda line: None)
for others in (False, True):  # the first process downloads
    if (rank > 0) == others:
        whole, blocks = load(args.tiny)
    dist.barrier()
student = sharded(lm_models.make_student(whole, 2).train(), device)
teacher = sharded(whole.eval().requires_grad_(False), device)
optimizer = kdkernels.AdamWAverage(student.parameters(), 1e-3, average="ema", decay=0.8)
begin = max((int(path.name) for path in args.folder.glob("[0-9]*")), default=0)
if begin:
    state = get_state_dict(student, optimizer)
    dcp.load({"model": state[0], "optimizer": state[1]}, checkpoint_id=args.folder / str(begin))
    set_state_dict(student, optimizer, model_state_dict=state[0], optim_state_dict=state[1])
for step in range(begin + 1, args.steps + 1):
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(step))
    parts = blocks[chosen[rank:8:world]].to(device).split(2)  # micro-batches of this process
    count = kdkernels.global_valid_count(parts, shift=1, averaged=True)
    total = torch.zeros((), device=device)
    for tokens in parts:
        (loss := loss_of(student, teacher, tokens, count)).backward()
        total += loss.detach() / world
    optimizer.step(), optimizer.zero_grad()
    dist.all_reduce(total)
    say(f"step {step}: loss {total:.6f}")
with torch.no_grad(), optimizer.swapped(student):
    average = loss_of(student, teacher, blocks[:4].to(device))
say(f"average of {optimizer.n_averaged} models: loss {average:.6f}")
state = get_state_dict(student, optimizer)
dcp.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=args.folder / str(args.steps))
dist.barrier()
os._exit(0)  # on a busy machine gloo's threads may abort or hold up a regular end
