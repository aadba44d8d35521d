"""MoLS in any program that calls `deepspeed.initialize`: one line before it.

torchrun --standalone --nproc_per_node 2 examples/patched.py

Started by `deepspeed --config FILE` (the shim in launch/) or `mols-ds launch`, a script does not even need that line.
"""

import deepspeed
import torch
from tiny import SECTION, model, sequences, show

import mols_ds

mols_ds.patch()  # <- MoLS

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 4, "total_num_steps": 24}},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 10**9,
    "mols": SECTION,
}

torch.manual_seed(0)
net = model()
engine, _, _, _ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=CONFIG)
rows = [row["input_ids"] for row in sequences()]
step = 0
while engine.global_steps < 24:  # not the number of batches: mode "probe" measures some of them only
    batch = torch.stack([rows[(4 * step + i) % len(rows)] for i in range(4)])
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    step += 1
show(engine.mols)
torch.distributed.barrier()  # without these two lines a thread of gloo may abort the exit
torch.distributed.destroy_process_group()
