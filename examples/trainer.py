"""MoLS in transformers' Trainer: one line beside the usual ones.

torchrun --standalone --nproc_per_node 2 examples/trainer.py
"""

import torch
from tiny import SECTION, model, sequences, show
from transformers import Trainer, TrainingArguments, set_seed

from mols_ds.integrations.transformers import MolsCallback

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3},
    "mols": SECTION,
}

arguments = TrainingArguments(
    output_dir="out/trainer",
    deepspeed=CONFIG,
    max_steps=24,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=2e-3,
    warmup_steps=4,
    logging_steps=4,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
)
set_seed(0)
trainer = Trainer(model=model(), args=arguments, train_dataset=sequences())
callback = MolsCallback().bind(trainer)  # <- MoLS
trainer.train()
show(callback.mols)
torch.distributed.barrier()  # without these two lines a thread of gloo may abort the exit
torch.distributed.destroy_process_group()
