"""A checkpoint of 0.4.0 with biases of fused projections, which moved, is refused with the rules that load it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_patches.cpu.emulation import cpu_megatron
from megatron_patches.group_rules import tag_layouts
from mols_ds.core.former_groups import former_rules
from mols_ds.core.groups import GroupTable
from mols_ds.errors import MolsCheckpointError
from tests.engines.megatron.building import Setup
from tests.engines.megatron.running import SECTION, Run
from tests.engines.megatron.tag_models import make_bert, one_rank, shapes_of
from tests.helpers.harness import run_cases

FORMERLY = [[r"linear_qkv\.bias$", "=weight"]]
BIAS_ROWS = {"qk": 2 * 6 * 8, "vo": 2 * 2 * 8}  # of two layers, four query and two key and value heads of 8


def resumed(kind: str) -> dict[str, Any]:
    """Train and save with the groups of 0.4.0, load with those of today, and with the rules that the refusal names."""
    setup = Setup(tp=2, bias=True)
    with cpu_megatron(fused_adam=True):
        with Run(setup, {**SECTION, "rules": FORMERLY}) as run:
            run.train(0, 10)
            saved, alphas = dict(run.mols.controller.table.elements), run.mols.alphas
            run.save(kind, kind)
        with Run(setup, SECTION) as run:
            today = dict(run.mols.controller.table.elements)
            with pytest.raises(MolsCheckpointError) as error:
                run.load(kind, kind)
        rules = _advised(str(error.value))
        with Run(setup, {**SECTION, "rules": rules}) as run:
            warned = run.load(kind, kind)
            run.train(10, 12)
            return {"saved": saved, "today": today, "rules": rules, "warned": warned, "same": run.mols.alphas == alphas}


def _advised(message: str) -> Sequence[Sequence[str]]:
    found = re.search(r'"rules": (\[\[.*\]\])', message)
    assert found is not None, message
    return list(json.loads(found[1]))


@pytest.mark.distributed
@pytest.mark.tier("all")
def test_the_refusal_names_rules_that_load_the_checkpoint() -> None:
    kind = "fully_reshardable"
    for rank in run_cases(resumed, 2, [(kind,)], timeout=120)[kind,]:
        assert rank["rules"] == [[r"^decoder\.layers\.\d+\.self_attention\.linear_qkv\.bias$", "=weight"]]
        assert rank["warned"] == [] and rank["same"]
        for group, rows in BIAS_ROWS.items():
            assert rank["saved"][group] == rank["today"][group] + rows
        assert rank["saved"]["other"] == rank["today"]["other"] - sum(BIAS_ROWS.values())


def test_of_bert() -> None:
    """Its binary head was `other`, too."""
    with one_rank():
        model = make_bert()
    table = GroupTable(tag_layouts(shapes_of(model), model.config), shapes_of(model))
    moved = {"qk": 2 * 24, "vo": 24, "head": -2 * 24, "other": -3 * 24 + 2 * 24}
    formerly = {group: count + moved.get(group, 0) for group, count in table.elements.items()}
    rules = former_rules(table, [], formerly)
    assert [target for _, target in rules] == ["=weight", "other"]
    assert GroupTable(tag_layouts(shapes_of(model), model.config, rules), shapes_of(model)).elements == formerly
