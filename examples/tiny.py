"""What the examples train: a LLaMA of two layers and sequences of numbers that it can learn, so that a CPU will do."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS, LENGTH = 128, 16
SECTION = {"start": 4, "samples": 8, "ramp_end": 16, "report_dir": "mols_report"}


def model() -> LlamaForCausalLM:
    """A LLaMA with random weights; nothing is downloaded."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, max_position_embeddings=64, **sizes))


def sequences(count: int = 256) -> list[dict[str, torch.Tensor]]:
    """`count` examples; some tokens are far more frequent than others, as in a language."""
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.rand(LENGTH, generator=generator) ** 3 * WORDS).long() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def show(mols) -> None:
    """Print the alphas, on rank 0."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(mols.phase, {group: round(alpha, 2) for group, alpha in mols.alphas.items()})
