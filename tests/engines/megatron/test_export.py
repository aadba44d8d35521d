"""`mols-ds report --to megatron`, applied: every parameter has the base rate times its group's alpha in each step."""

from __future__ import annotations

from typing import Any

import pytest

from mols_ds.core.schema import NUMBERS
from mols_ds.report.export import export
from tests.engines.megatron.building import Setup, build, newest, optimizer, start
from tests.helpers.harness import run_ranks

ALPHAS = {"embedding": 3.0, "head": 0.5, "qk": 1.5, "vo": 2.0, "mlp": 1.25}
SETUPS = {
    "dense": Setup(pp=2, distributed=False, position="learned", bias=True),
    "tied": Setup(pp=2, distributed=False, tied=True),
    "experts": Setup(ep=2, distributed=False, experts=4, shared_expert=True, qk_norm=True),
    "mla": Setup(pp=2, distributed=False, mla=True, q_lora=True, mtp=1),
}


def exported(tied: bool) -> str:
    row: dict[str, Any] = {"elements": 1, "clamped": False} | dict.fromkeys(NUMBERS)
    groups = {group: row | {"alpha": alpha} for group, alpha in ALPHAS.items() if not (tied and group == "head")}
    words = {"schema": 1, "step": 3, "samples": 8, "mode": "online", "estimator": "damping", "reference": "vo"}
    return export({**words, "groups": groups, "world": {}, "versions": {}}, "megatron")  # type: ignore[arg-type, typeddict-item]


def rates_are_right(name: str) -> dict[str, float]:
    """On a rank: parameter -> its rate over the base rate, which is asserted to be the same in each step."""
    from megatron_patches.cpu.emulation import cpu_megatron

    with cpu_megatron():
        setup = SETUPS[name]
        start(setup)
        built = build(setup)
        source: dict[str, Any] = {}
        exec(compile(exported(setup.tied), "exported", "exec"), source)
        made, scheduler = optimizer(built, groups=source["config_overrides"])
        names = {id(p): name for chunk in built.chunks for name, p in chunk.named_parameters()}
        ratios: list[dict[str, float]] = []
        for _ in range(20):
            scheduler.step(1)
            base = scheduler.get_lr({})
            ratios.append({names[id(p)]: g["lr"] / base for g in made.param_groups for p in g["params"]})
        assert set(ratios[0]) == set(names.values())
        for found in ratios:
            assert found == pytest.approx(ratios[0])
        return ratios[0]


def alpha_of(name: str, tied: bool) -> float:
    """By megatron_patches' rules; fused parameters and what is not scaled: 1."""
    from megatron_patches.group_rules import MEGATRON_RULES

    target = next((rule.target for rule in MEGATRON_RULES if rule.regex.search(name)), "other")
    group = target if isinstance(target, str) else "other"
    return ALPHAS.get("embedding" if tied and group == "head" else group, 1.0)


def check(name: str, environment: dict[str, str] | None = None) -> None:
    seen: set[float] = set()
    for rank in run_ranks(rates_are_right, 2, name, environment=environment):
        wanted = {each: alpha_of(each, SETUPS[name].tied) for each in rank}
        assert rank == pytest.approx(wanted, rel=1e-12)
        seen |= set(wanted.values())
    assert {3.0, 2.0, 1.25} <= seen


@pytest.mark.parametrize(
    "name", ["dense", *(pytest.param(n, marks=pytest.mark.tier("all")) for n in SETUPS if n != "dense")]
)
def test_rates_of_the_exported_overrides(name: str) -> None:
    check(name)


@pytest.mark.tier("all")
@pytest.mark.skipif(newest() is None, reason="no newest megatron-core beside the installed one: make setup-dev")
def test_rates_with_the_newest_megatron() -> None:
    check("dense", {"PYTHONPATH": str(newest())})
