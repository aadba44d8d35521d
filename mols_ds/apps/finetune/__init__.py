"""Fine-tuning on instructions and answers: full, LoRA or DoRA, with DeepSpeed and MoLS. See finetune.py."""
