"""Models of one config have the same groups and element counts in transformers and in Megatron-core, however cut."""

from __future__ import annotations

import functools
import math
from collections import Counter

import pytest
import torch
from torch import nn

from megatron_patches.group_rules import tag_table
from mols_ds.core.groups import GroupTable, group_table
from tests.engines.megatron.building import newest
from tests.engines.megatron.families import FAMILIES, OURS, counted_here, megatron_model, of_transformers
from tests.engines.megatron.tag_models import make_bert, make_t5, one_rank
from tests.helpers.harness import Results, run_cases

WORLD = 2
LATENT = ("deepseek_v2", "deepseek_v3")
HYBRID = [name for name, family in FAMILIES.items() if family.pattern]
needs_newest = pytest.mark.skipif(newest() is None, reason="no newest megatron-core: make setup-dev")


@functools.cache
def of_ranks(hybrid: bool) -> Results:
    cases = [(name,) for name in FAMILIES if (name in HYBRID) == hybrid]
    return run_cases(counted_here, WORLD, cases, environment={"PYTHONPATH": str(newest())} if hybrid else None)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in HYBRID])
def test_one_rank_has_the_groups_of_transformers(name: str) -> None:
    with one_rank():
        assert tag_table(megatron_model(name)).elements == of_transformers(name)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_encoders_have_the_matrices_of_transformers(name: str) -> None:
    """Vectors differ: Megatron's BERT has its norms before the layers, its vanilla T5 none after the last."""
    with one_rank():
        table = tag_table(make_t5() if name == "t5" else make_bert())
    with torch.device("meta"):
        theirs = t5_of_transformers() if name == "t5" else bert_of_transformers()
    assert matrices(table) == matrices(group_table(theirs))


def matrices(table: GroupTable) -> dict[str, int]:
    found: Counter[str] = Counter()
    for parameter, layout in table.layouts.items():
        if len(table.shapes[parameter]) > 1:
            found.update(layout.counts(0, math.prod(table.shapes[parameter])))
    return found


def t5_of_transformers() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # Megatron's is not tied
    return model


def bert_of_transformers() -> nn.Module:
    from transformers import BertConfig, BertForPreTraining

    sizes = {key: OURS[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")}
    config = BertConfig(**sizes, num_hidden_layers=1, max_position_embeddings=16, tie_word_embeddings=False)
    return BertForPreTraining(config)


@pytest.mark.distributed
@pytest.mark.tier("all")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_newest if name in HYBRID else ()) for name in FAMILIES]
)
def test_tensor_parallel_ranks_have_them_together(name: str) -> None:
    expected = of_transformers(name)
    ranks = of_ranks(name in HYBRID)[name,]
    assert len(ranks) == WORLD
    together: Counter[str] = Counter()
    for rank in ranks:
        assert rank["logical"] == expected
        assert 0 < sum(rank["mine"].values()) < sum(expected.values())
        together.update(rank["mine"])
    assert together == expected
