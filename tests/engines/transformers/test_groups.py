"""Group tables of models whose config defines how a weight is fused."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from mols_ds.core.groups import group_table


def test_a_fused_parameter_counts_in_both_of_its_groups() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=40))
    rows = {row.group: row for row in group_table(model)}
    assert (rows["qk"].parameters, rows["vo"].parameters) == (1, 2)


def test_the_config_of_the_inner_model_is_found_behind_an_engine() -> None:
    with torch.device("meta"):
        inner = AutoModelForCausalLM.from_config(
            transformers.GPTNeoXConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=40)
        )

    class Engine(nn.Module):  # as DeepSpeed's: the model is `module`, and `config` is something else
        def __init__(self) -> None:
            super().__init__()
            self.module = inner
            self.config = {"train_batch_size": 8}

    table = group_table(Engine())
    assert table.elements == group_table(inner).elements
    assert all(name.startswith("module.") for name in table.layouts)
