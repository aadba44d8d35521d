"""The tuners of the installed peft: an adapter's weights are in the group of what they adapt, or refused."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from mols_ds.core.groups import GroupTable, group_table
from mols_ds.errors import MolsConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

TARGETS = {"q_proj": "qk", "o_proj": "vo", "up_proj": "mlp"}
SETTINGS: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": ["up_proj"]},
    "ADALORA": {"total_step": 10},
    "OFT": {"oft_block_size": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "FOURIERFT": {"n_frequency": 10},
    "WAVEFT": {"n_frequency": 10},
    "C3A": {"block_size": 4},
    "RANDLORA": {"r": 2},
    "MISS": {"r": 8},
    "SHIRA": {"r": 2},
    "ROAD": {"group_size": 8},
}
ADAPTERS = (
    "LORA",
    "ADALORA",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LILY",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "OSF",
    "PEANUT",
    "POLY",
    "PSOFT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "VERA",
    "WAVEFT",
)
SHARED = {"LILY", "RANDLORA", "PVERA", "VBLORA", "TINYLORA", "UNILORA"}
"""Those that use a weight in several layers: refused where these are of several groups."""


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def neox() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, num_attention_heads=4))


def adapted(kind: str, model: nn.Module, targets: list[str]) -> nn.Module:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    settings = {"target_modules": targets, "task_type": "CAUSAL_LM", **SETTINGS.get(kind, {})}
    if kind == "IA3" and "up_proj" not in targets:
        settings["feedforward_modules"] = []
    known = inspect.signature(config).parameters
    result: nn.Module = peft.get_peft_model(
        model, config(**{key: value for key, value in settings.items() if key in known})
    )
    return result


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def pasted(error: MolsConfigError) -> list[list[str]]:
    rules: list[list[str]] = json.JSONDecoder().raw_decode(str(error).partition('"rules": ')[2])[0]
    return rules


def check(model: nn.Module, table: GroupTable) -> None:
    parameters = trainable(model)
    assert set(table.layouts) == set(parameters) and len(parameters) > 2
    for name in parameters:
        (target,) = [group for module, group in TARGETS.items() if f".{module}." in name]
        bias = re.search(r"(^|\.)bias$", name) is not None
        assert table.layouts[name].groups == ("other" if bias else target,), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_separate_projections(kind: str) -> None:
    model = adapted(kind, llama(), list(TARGETS))
    try:
        check(model, group_table(model))
    except MolsConfigError as error:
        assert kind in SHARED and "several groups" in str(error)
        group_table(model, pasted(error))


@pytest.mark.parametrize("kind", sorted(SHARED & {"VBLORA", "TINYLORA", "UNILORA"}))
def test_a_weight_that_all_layers_share_is_refused_or_in_their_one_group(kind: str) -> None:
    several = adapted(kind, llama(), list(TARGETS))
    with pytest.raises(MolsConfigError, match="several groups") as error:
        group_table(several)
    assert "other" in group_table(several, pasted(error.value)).elements
    one = adapted(kind, llama(), ["q_proj", "k_proj"])
    assert set(group_table(one).elements) == {"qk"}


@pytest.mark.parametrize("kind", ["LORA", "ADALORA", "VERA", "OFT", "LOHA", "LOKR", "IA3"])
def test_adapters_of_a_fused_projection(kind: str) -> None:
    model = adapted(kind, neox(), ["query_key_value"])
    if kind in ("LOHA", "LOKR", "IA3"):  # neither its rows nor its inputs
        with pytest.raises(MolsConfigError, match="adapts a fused projection") as error:
            group_table(model)
        assert set(group_table(model, pasted(error.value)).elements) == {"other"}
        return
    table = group_table(model)
    for name, layout in table.layouts.items():
        rows = re.search(r"lora_B|lambda_b", name) is not None
        assert layout.groups == (("qk", "vo") if rows else ("vo",)), name
        if rows:
            assert layout.counts(0, 96 * table.shapes[name][-1] if len(table.shapes[name]) > 1 else 96)["vo"] > 0


def test_prompts_and_norms() -> None:
    prompt = adapted_prompt("PROMPT_TUNING")
    assert group_table(prompt).elements == {"embedding": 4 * 32}
    norms = peft.get_peft_model(llama(), peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]))
    assert set(group_table(norms).elements) == {"other"}


def adapted_prompt(kind: str) -> nn.Module:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    result: nn.Module = peft.get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    return result
