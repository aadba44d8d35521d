"""Every config class of the installed transformers: the groups of docs/models.md, and placements written by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from torch import nn

from mols_ds.core.groups import GroupTable, group_table
from tests.engines.transformers.placements import FAMILIES, places

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/models.md"
SHARE = 8
"""One in so many config classes is built in the quick tier, beside the families of `placements`."""


def load_writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_models", ROOT / "docs/write_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITER = load_writer()


def written(rows: list[Any]) -> list[str]:
    """Rows whose line the page lacks."""
    lines = set(PAGE.read_text("utf-8").splitlines())
    return [row.line() for row in rows if row.line() not in lines]


def test_the_page_is_of_the_installed_transformers() -> None:
    assert f"transformers {transformers.__version__}:" in PAGE.read_text("utf-8"), "run `make docs-models`"


def test_a_share_of_the_config_classes_is_as_the_page_says() -> None:
    """Fast form of the sweep: no crash, no element uncounted (`row` checks it), the groups of the page."""
    rows = WRITER.sweep(WRITER.model_types()[::SHARE])
    assert len(rows) > 80 and written(rows) == [], "run `make docs-models`"


@pytest.mark.tier("full")
def test_the_page_is_current() -> None:
    rows = WRITER.sweep(WRITER.model_types())
    text = PAGE.read_text("utf-8")
    assert written(rows) == [] and WRITER.page(text, rows) == text, "run `make docs-models`"


def test_every_causal_model_that_can_be_built_passes() -> None:
    table = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    text = PAGE.read_text("utf-8")
    passes, _, rest = text.partition("## Refused")
    refused, _, unbuilt = rest.partition("## Not built")
    missing = {name for name in table if f"| `{name}` |" not in passes}
    assert not any(f"| `{name}` |" in refused for name in table if name in missing)
    assert all(f"| `{name}` |" in unbuilt for name in missing) and len(missing) < 12


@pytest.mark.tier("full")
def test_the_rules_of_a_refusal_are_enough() -> None:
    text = PAGE.read_text("utf-8").partition("## Refused")[2].partition("## Not built")[0]
    refused = re.findall(r"^\| `([\w.-]+)` \| (\w+) \| `(.*)` \|$", text, re.M)
    assert len(refused) > 20
    for model_type, name, rules in refused:
        model = WRITER.built(model_type, name)
        assert isinstance(model, nn.Module)
        table = group_table(model, json.loads(rules))
        assert sum(table.elements.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------- placements by hand


def kinds(model: nn.Module, table: GroupTable) -> dict[str, str]:
    """Kind of each weight of two dimensions or more, biases left out -> its groups as `placements` writes them."""
    found: dict[str, str] = {}
    for name, layout in table.layouts.items():
        shape = table.shapes[name]
        if len(shape) < 2 or re.search(r"bias(es)?$", name):
            continue
        kind = re.sub(r"(?<![^.])\d+(?=\.|$)", "N", name).removesuffix(".weight")
        if len(layout.groups) == 1:
            target = layout.groups[0]
        else:
            assert layout.inner == math.prod(shape[1:])
            target = "+".join(f"{group}{length}" for length, group in layout.pattern)
        assert found.setdefault(kind, target) == target, f"{kind} differs between layers"
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_placement(family: str) -> None:
    model = next(m for name in WRITER.classes(family) if isinstance(m := WRITER.built(family, name), nn.Module))
    expected = places(family)
    used: set[str] = set()
    for kind, target in kinds(model, group_table(model)).items():
        fits = [
            name
            for name, place in expected.items()
            if f".{kind}".endswith(f".{name.partition('/')[2] or name}")
            and (not place.inside or f".{place.inside}." in f".{kind}")
        ]
        assert fits, f"{kind} is not in the table of {family}"
        best = max(fits, key=lambda name: ("/" in name, len(name)))
        assert target == expected[best].target, f"{family}: {kind}"
        used.add(best)
    tied = {name for name, place in expected.items() if place.target == "head"}
    assert set(expected) - used <= tied, "names that the model has not"
