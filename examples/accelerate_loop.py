"""MoLS in a loop of Accelerate: one call after `prepare`.

torchrun --standalone --nproc_per_node 2 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from tiny import SECTION, model, sequences, show
from transformers import get_linear_schedule_with_warmup, set_seed

from mols_ds.integrations.accelerate import attach, log_values

UPDATES = 24
CONFIG = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 2}}

PartialState(cpu=not torch.cuda.is_available())
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG))
set_seed(0)
net = model()
adamw = torch.optim.AdamW(net.parameters(), lr=2e-3)
processes = accelerator.num_processes
linear = get_linear_schedule_with_warmup(adamw, 4 * processes, UPDATES * processes)  # Accelerate's own count
data = torch.utils.data.DataLoader(sequences(), batch_size=4, shuffle=True)

engine, optimizer, loader, scheduler = accelerator.prepare(net, adamw, data, linear)
mols = attach(engine, SECTION, scheduler=scheduler)  # <- MoLS

updates = 0
while updates < UPDATES:
    for batch in loader:
        loss = engine(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if accelerator.optimizer_step_was_skipped:  # measured only
            continue
        updates += 1
        if updates % 8 == 0:
            rates = {key: round(value, 5) for key, value in log_values(mols).items() if key.startswith("mols/lr/")}
            accelerator.print(f"update {updates}: loss {loss.item():.3f}, {rates}")
        if updates == UPDATES:
            break
show(mols)
accelerator.wait_for_everyone()  # without these two lines a thread of gloo may abort the exit
accelerator.end_training()
