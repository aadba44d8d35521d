"""What the DeepSpeed engine refuses of each optimizer class, and when DeepSpeed's own version is taken."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mols_ds.core.config import MolsConfig
from mols_ds.engines.deepspeed.checks import check_supported
from mols_ds.engines.deepspeed.compat import ENGINE_NAMES
from mols_ds.errors import MolsConfigError, MolsUnsupportedError, MolsWarning
from mols_ds.optim.build import split_config
from mols_ds.optim.catalog import OPTIMIZERS
from mols_ds.optim.choose import fill, rename
from tests.helpers.optimizer_facts import CLASSES, MODULES, REASONS, Facts, stand_in


def refusal(optimizer: Any, stage: int, mode: str = "probe") -> str:
    """The message of `check_supported` on just enough of an engine, or ""."""
    stub = dict.fromkeys(set(ENGINE_NAMES) - {"optimizer"}, 0)
    stub |= {"zero_optimization": lambda: stage > 0, "managed_gradient_accumulation": lambda: True}
    engine = SimpleNamespace(optimizer=optimizer, config={}, **{**stub, "module": torch.nn.Module()})
    try:
        check_supported(engine, MolsConfig.parse({"start": 1, "ramp_end": 9, "mode": mode}))
    except MolsUnsupportedError as error:
        return str(error)
    return ""


def proportional(name: str) -> dict[str, Any]:
    """Settings with which pytorch-optimizer's AdaFactor takes lr for its rate."""
    return {"betas": (None, 0.99), "relative_step": False} if name == "AdaFactor" else {}


@pytest.mark.parametrize("facts", CLASSES, ids=lambda facts: facts.name)
def test_each_class(facts: Facts) -> None:
    why = f"MoLS does not support {facts.name}"
    instead = "use Adam or AdamW" if facts.refused == REASONS["1-bit"] else "use Adam, AdamW, SGD, Lion, ..."
    for package in MODULES:
        if package == "deepspeed" and "Muon" in facts.name:
            continue  # see below
        at_zero = refusal(stand_in(facts.name, package, **proportional(facts.name)), 0)
        assert at_zero == (f"{why} ({facts.refused}): {instead}" if facts.refused else "")
        sharded = refusal(stand_in(facts.name, package, **proportional(facts.name)), 2)
        if facts.reads_tensors:
            assert sharded == (
                f"{why} under ZeRO (it reads whole tensors and gets flat shards, which makes it another optimizer): "
                'set "zero_optimization.stage": 0, or name one that sums over the shards: Lamb, AdamMini or SGG '
                'with "source": "library"'
            )
        else:
            assert sharded == at_zero


@pytest.mark.parametrize("facts", [f for f in CLASSES if not f.refused], ids=lambda facts: facts.name)
def test_mode_moments(facts: Facts) -> None:
    """Two betas in each group, and neither a class nor a package that is known to keep other state."""
    message = (
        f'MoLS does not support mode "moments" with {facts.name}, which keeps no Adam moments: use "mode": "probe" or '
        '"online"'
    )
    for package in MODULES:
        if package == "deepspeed" and "Muon" in facts.name:
            continue
        keeps = facts.adam_moments and package != "bitsandbytes"
        if facts.name != "AdaFactor":
            found = refusal(stand_in(facts.name, package, betas=(0.9, 0.95)), 0, "moments")
            assert found == ("" if keeps else message), package
        for group in ({}, {"betas": (0.9, 0.95, 0.99)}, {"betas": None}):
            assert refusal(stand_in(facts.name, package, **{**group, **proportional(facts.name)}), 0, "moments")


def test_unknown_classes() -> None:
    """They may be scaled, on shards too; Adam's moments are assumed from two betas, but not of any kind of Lion."""
    assert not refusal(stand_in("Sophia", betas=(0.9, 0.95)), 2, "moments")
    assert "keeps no Adam moments" in refusal(stand_in("TigerLion", betas=(0.9, 0.95)), 2, "moments")


@pytest.mark.parametrize("name", ["Muon", "MuonWithAuxAdam"])
@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeeds_muon(name: str, stage: int) -> None:
    assert refusal(stand_in(name, "deepspeed"), stage) == (
        "MoLS does not support Muon under DeepSpeed (its gradients are already orthogonalised when they can be read): "
        'use Adam or AdamW, or the library\'s at ZeRO stage 0: "source": "library"'
    )


@pytest.mark.parametrize("group", [{"betas": (None, 0.9)}, {"betas": (0.9, 0.99), "relative_step": False}])
def test_adafactor_with_a_rate_of_its_own(group: dict[str, Any]) -> None:
    assert refusal(stand_in("AdaFactor", "pytorch_optimizer", **group), 0) == (
        "MoLS does not support AdaFactor with relative_step or momentum (lr is not what its step is multiplied by): "
        "set relative_step=False and betas=(None, beta2)"
    )


# ---------------------------------------------------------------------- DeepSpeed's version or the library's

ADAM = "lr, betas, eps, weight_decay"
KERNEL = "torch_adam, adam_w_mode, fp32_optimizer_states, foreach, fused"
PARAMETERS = {
    "Adam": f"{ADAM}, bias_correction, amsgrad, {KERNEL}",
    "AdamW": f"{ADAM}, bias_correction, amsgrad, {KERNEL}",
    "Lion": "lr, betas, weight_decay",
    "Lamb": f"{ADAM}, bias_correction, eps_inside_sqrt, max_coeff, min_coeff, amsgrad",
    "Muon": f"{ADAM}, momentum, ns_method, muon_lr, adam_lr, {KERNEL}",
}
"""Parameters of those that `--optimizer NAME` leaves to DeepSpeed."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_name_on_the_command_line(name: str) -> None:
    """Deepspeed's own of PARAMETERS, the library's of all others; the parameters in the message are those it takes."""
    given = {"type": "Sophia", "params": {"lr": 1e-3, "rho": 0.1}}
    with pytest.raises(MolsConfigError) as caught:
        rename(given, name.lower())
    names = PARAMETERS.get(name, ", ".join(OPTIMIZERS[name].settings))
    if name == "Adafactor":
        assert "betas" not in names
    assert str(caught.value) == (
        f"--optimizer {name.lower()} has no 'rho', which the config gives to Sophia; it has {names}"
    )
    renamed = rename({"type": "Sophia", "params": {"lr": 1e-3}}, name.lower())
    source = {} if name in PARAMETERS else {"source": "library"}
    assert renamed == {"type": name, **source, "params": {"lr": 1e-3}}


ON_A_CPU: list[tuple[str, dict[str, Any], str]] = [
    *((name, {}, "library") for name in ("Lion", "lamb", "Muon")),
    *((name, {}, "") for name in ("Adam", "adamw", "NAdam", "Adafactor", "RMSprop")),
    ("Lion", {"stage": 2, "offload_optimizer": {"device": "cpu"}}, ""),
    ("Lamb", {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "library"),
    ("Lion", {"stage": 2}, "library"),
    ("Muon", {"stage": 1}, "torch_adam"),
]


@pytest.mark.parametrize(("name", "zero", "expected"), ON_A_CPU)
def test_where_deepspeeds_version_runs(name: str, zero: dict[str, Any], expected: str) -> None:
    config = {"optimizer": {"type": name, "params": {"lr": 1e-3}}, "zero_optimization": zero}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fill(config)
    section: Any = config["optimizer"]
    kernel = [str(w.message) for w in seen if issubclass(w.category, MolsWarning)]
    assert section.get("source", "") == ("library" if expected == "library" else "")
    assert bool(kernel) == (expected == "library")
    assert all(f"DeepSpeed's {name.capitalize()} needs a CUDA kernel" in line for line in kernel)
    assert section["params"].get("torch_adam") == (True if expected == "torch_adam" else None)


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        *((n, True) for n in ("Adafactor", "Lamb", "lamb", "LAMB")),
        *((n, False) for n in ("Muon", "Lion", "Adam", "NAdam")),
    ],
)
def test_deepspeeds_own_on_flat_shards(name: str, warned: bool) -> None:
    """Its Muon handles shards; the other two read whole tensors, but DeepSpeed gives them shards."""
    for stage in (0, 1):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert split_config({"optimizer": {"type": name}, "zero_optimization": {"stage": stage}}) is None
        said = [str(w.message) for w in seen if issubclass(w.category, MolsWarning)]
        assert [f"DeepSpeed gives {name} flat shards at ZeRO stage 1" in line for line in said] == [True] * (
            warned and stage
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_offload_to_nvme(name: str) -> None:
    offload = {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    config = {"optimizer": {"type": name, "source": "library"}, "zero_optimization": offload}
    if OPTIMIZERS[name].reads == "tensors":
        with pytest.raises(MolsUnsupportedError, match=f"optimizer {name} needs whole tensors, but ZeRO stage 3"):
            split_config(config)
    elif name == "Adam8bit":
        with pytest.raises(MolsUnsupportedError, match="optimizer Adam8bit cannot be offloaded to NVMe: set"):
            split_config(config)
    else:
        assert split_config(config) is not None
