"""Fine-tuning on instructions and answers: full, LoRA or DoRA, under DeepSpeed with MoLS. See finetune.py."""
