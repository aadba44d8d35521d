"""MoLS in a loop of plain torch, as nanoGPT has it: one call after the model is wrapped, one before clipping.

torchrun --standalone --nproc_per_node 2 examples/plain_loop.py

`python examples/plain_loop.py` runs it in one process. The loop counts its own iterations and computes its own rate, so
it uses mode "online", whose samples are ordinary updates.
"""

import math
import os

import torch
import torch.distributed as dist
from tiny import SECTION, model, sequences, show
from torch.nn.parallel import DistributedDataParallel

import mols_ds

ITERATIONS, WARMUP, LR, ACCUMULATION, CLIP = 24, 4, 2e-3, 2, 1.0
ddp = "RANK" in os.environ
if ddp:
    dist.init_process_group("gloo" if not torch.cuda.is_available() else "nccl")
rank, world = (dist.get_rank(), dist.get_world_size()) if ddp else (0, 1)


def rate(iteration: int) -> float:
    """Linear warm-up, then half a cosine."""
    done = (iteration - WARMUP) / (ITERATIONS - WARMUP)
    return LR * (iteration + 1) / WARMUP if iteration < WARMUP else LR * (1 + math.cos(math.pi * done)) / 2


torch.manual_seed(0)
raw = model()
net = DistributedDataParallel(raw) if ddp else raw
optimizer = torch.optim.AdamW(raw.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
mols = mols_ds.attach(optimizer, net, {**SECTION, "mode": "online", "ramp_end": 20}, total_steps=ITERATIONS)  # <- MoLS

rows = [row["input_ids"] for row in sequences()]
for iteration in range(ITERATIONS):
    for group in optimizer.param_groups:
        group["lr"] = rate(iteration)
    for micro in range(ACCUMULATION):
        if ddp:
            net.require_backward_grad_sync = micro == ACCUMULATION - 1
        begin = 4 * (world * (ACCUMULATION * iteration + micro) + rank)
        batch = torch.stack([rows[(begin + i) % len(rows)] for i in range(4)])
        (net(input_ids=batch, labels=batch).loss / ACCUMULATION).backward()
    mols.read_gradients()  # <- MoLS: its statistics are of the unclipped gradient
    torch.nn.utils.clip_grad_norm_(raw.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
show(mols)
if ddp:
    dist.barrier()
    dist.destroy_process_group()
