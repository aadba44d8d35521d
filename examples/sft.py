"""MoLS in TRL's SFTTrainer, here with LoRA. DPOTrainer is the same.

torchrun --standalone --nproc_per_node 2 examples/sft.py
"""

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import SECTION, WORDS, model, sequences, show
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from mols_ds.integrations.transformers import MolsCallback

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
}

vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "</s>", *(f"w{i}" for i in range(WORDS - 3))])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
texts = [" ".join(f"w{int(token) % (WORDS - 3)}" for token in row["input_ids"]) for row in sequences()]

arguments = SFTConfig(
    output_dir="out/sft",
    deepspeed=CONFIG,
    max_steps=24,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    logging_steps=4,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    bf16=torch.cuda.is_available(),
    gradient_checkpointing=False,
    use_cpu=not torch.cuda.is_available(),
)
set_seed(0)
trainer = SFTTrainer(
    model=model(),
    args=arguments,
    train_dataset=Dataset.from_list([{"text": text} for text in texts]),
    processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>"),
    peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
)
callback = MolsCallback(SECTION).bind(trainer)  # <- MoLS
trainer.train()
show(callback.mols)
torch.distributed.barrier()  # without these two lines a thread of gloo may abort the exit
torch.distributed.destroy_process_group()
