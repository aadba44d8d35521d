"""Models of one config have the same groups and element counts in transformers and in Megatron-core, however cut."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from megatron_patches.group_rules import tag_table
from tests.engines.megatron.building import newest
from tests.engines.megatron.families import FAMILIES, counted_here, megatron_model, of_transformers
from tests.engines.megatron.tag_models import one_rank
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


@pytest.mark.distributed
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
