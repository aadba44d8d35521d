"""Which optimizers of Megatron-core MoLS scales, and which keep Adam's moments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_patches.precision import optimizer_refusals
from tests.helpers.optimizer_facts import stand_in


def applying(name: str, inner: Any, mode: Any) -> list[str]:
    outer = SimpleNamespace(config=SimpleNamespace(optimizer=name), optimizer=inner)
    return [f"{r.what}: {r.way_out}" for r in optimizer_refusals(outer, mode) if r.applies]


@pytest.mark.parametrize("name", ["adam", "sgd", "lion", "Adam", "muon", "dist_muon", "soap", "adamw"])
def test_names_that_are_scaled(name: str) -> None:
    found = applying(name, stand_in("Adam", "torch", betas=(0.9, 0.95)), "probe")
    if name.lower() in ("adam", "sgd", "lion"):
        assert found == []
    else:
        assert found == [
            f"optimizer {name!r}: its update depends on a whole matrix, which the signal-to-noise ratio of single "
            "elements says nothing about: one of 'adam', 'sgd', 'lion'"
        ]


@pytest.mark.parametrize(
    ("name", "package", "keeps"),
    [
        *(("Adam", "torch", True), ("AdamW", "torch", True), ("SGD", "torch", False)),
        *(("FusedAdam", "apex", True), ("FusedSGD", "apex", False), ("FusedAdam", "transformer_engine", True)),
        ("FusedSGD", "transformer_engine", False),
        *(
            ("CpuFusedAdam", "elsewhere", True),
            ("Lion", "elsewhere", False),
            ("HybridDeviceOptimizer", "elsewhere", False),
        ),
    ],
)
def test_mode_moments(name: str, package: str, keeps: bool) -> None:
    with_betas = applying("adam", stand_in(name, package, betas=(0.9, 0.95)), "moments")
    refused = ['mode \'moments\' with an optimizer that keeps no Adam moments: mode "probe" or "online"']
    assert [line for line in with_betas if "moments" in line] == ([] if keeps else refused)
    assert applying("adam", stand_in(name, package), "moments")[-1:] == refused


def steps_on_views() -> dict[str, list[tuple[bool, bool]]]:
    """Runs on one rank: (elementwise, shared counter) of each scaler that `attach` makes, by Megatron's Adam."""
    import megatron_patches
    from megatron_patches.cpu.emulation import cpu_megatron
    from tests.engines.megatron import building

    found = {}
    for fused in (False, True):
        with cpu_megatron(fused_adam=fused):
            setup = building.Setup()
            building.start(setup)
            built = building.build(setup)
            optimizer, scheduler = building.optimizer(built)
            mols = megatron_patches.attach(built.chunks, optimizer, scheduler, {"start": 1, "ramp_end": 9})
            found["fused" if fused else "torch"] = [(s.elementwise, s.shared_counter) for s in mols.scalers]
            mols.detach()
    return found


@pytest.mark.distributed
def test_torchs_adamw_is_stepped_on_views() -> None:
    """The stand-in for Transformer Engine's and apex's Adam is not in the catalog, so it is stepped by delta."""
    from tests.helpers.harness import run_ranks

    assert run_ranks(steps_on_views, 1) == [{"torch": [(True, False)], "fused": [(False, False)]}]
