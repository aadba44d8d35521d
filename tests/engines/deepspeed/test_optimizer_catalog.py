"""Optimizers by name: names, settings, which weights are matrices, and everything that is refused, by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn

from mols_ds.core.config import MolsConfig
from mols_ds.engines.deepspeed.checks import check_supported
from mols_ds.engines.deepspeed.compat import ENGINE_NAMES
from mols_ds.errors import MolsConfigError, MolsError, MolsUnsupportedError, MolsWarning
from mols_ds.optim.build import Request, build, split_config
from mols_ds.optim.catalog import OPTIMIZERS, known_to_deepspeed
from mols_ds.optim.choose import rename
from mols_ds.optim.traits import is_elementwise
from mols_ds.training.ds_config import resolve
from tests.helpers.oracle.models import HIDDEN
from tests.helpers.oracle.models import build as tiny

LIBRARY = {"source": "library"}
TENSORS = [name for name, entry in OPTIMIZERS.items() if entry.reads == "tensors"]


def config(name: str, stage: int = 0, **more: Any) -> dict[str, Any]:
    params = more.pop("params", {})
    return {"optimizer": {"type": name, "params": params, **more}, "zero_optimization": {"stage": stage}}


def request(name: str, stage: int = 0, **params: Any) -> Request:
    found = split_config(config(name, stage, params=params, **LIBRARY))
    assert found is not None
    return found


def test_what_deepspeed_knows_stays_deepspeeds() -> None:
    """A class of torch.optim, not a submodule of that name (torch.optim.nadam)."""
    known = {name for name in OPTIMIZERS if known_to_deepspeed(name)}
    assert known == {"Adam", "AdamW", "NAdam", "Lion", "Lamb", "Muon", "Adafactor"}
    assert not known_to_deepspeed("nadam") and not known_to_deepspeed("Optimizer") and known_to_deepspeed("RMSprop")
    for name in known:
        assert split_config(config(name)) is None and split_config(config(name, source="deepspeed")) is None
        assert request(name).entry.name == name
    assert split_config({}) is None and split_config(config("RMSprop", 2)) is None


def test_the_rest_of_the_config_is_deepspeeds() -> None:
    given = {**config("SOAP"), "mols": {"rules": [["x", "mlp"]]}, "bf16": {"enabled": True}}
    found = split_config(given)
    assert found is not None and "optimizer" not in found.config and found.rules == [["x", "mlp"]]
    assert found.config["zero_allow_untested_optimizer"] and found.config["bf16"] == {"enabled": True}
    assert "optimizer" in given, "the user's dict is left as it is"


REFUSED: list[tuple[dict[str, Any], type[MolsError], str]] = [
    (config("Sopa"), MolsConfigError, r"'Sopa' is unknown; known are Adam, AdamW"),
    (config("SOAP", source="torch"), MolsConfigError, r'"optimizer.source" is \'torch\'; allowed are "library"'),
    (config("SOAP", source="deepspeed"), MolsConfigError, r"which has no 'SOAP'; leave it out"),
    (config("RMSprop", source="library"), MolsConfigError, r"'RMSprop' is unknown; known are"),
    (config("SOAP", params={"lr": 1, "rnak": 3}), MolsConfigError, r"SOAP of .* has no 'rnak'; it has lr"),
    (config("Lion", params={"eps": 1e-8}, source="library"), MolsConfigError, r"Lion of .* has no 'eps'"),
    *((config(n, s, **LIBRARY), MolsUnsupportedError, rf"optimizer {n} .*ZeRO stage {s} .*stage\": 0")
      for n in TENSORS for s in (1, 2, 3)),
    (config("Muon", 2, **LIBRARY), MolsUnsupportedError, r'DeepSpeed\'s own on stages 1 and 2'),
    ({**config("SOAP"), "tensor_parallel": {"autotp_size": 2}}, MolsUnsupportedError, r"SOAP .*AutoTP"),
    ({"optimizer": {"type": "SGG"}, "zero_force_ds_cpu_optimizer": True,
      "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
     MolsUnsupportedError, r'SGG cannot go with "zero_force_ds_cpu_optimizer": true; remove'),
    ({"optimizer": {"type": "Adam8bit"}, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
     MolsUnsupportedError, r'Adam8bit cannot be offloaded to NVMe: set .*"cpu"'),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "message"), REFUSED)
def test_refused_before_an_engine_is_built(given: dict[str, Any], kind: type[MolsError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        split_config(given)
    assert "\n" not in str(caught.value)


def test_offload_is_told_to_deepspeed() -> None:
    found = split_config(
        {"optimizer": {"type": "SGG"}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    )
    assert found is not None and found.config["zero_force_ds_cpu_optimizer"] is False


def test_deepspeeds_own_on_flat_shards_is_warned_of() -> None:
    with pytest.warns(MolsWarning, match=r"Adafactor flat shards at ZeRO stage 2"):
        assert split_config(config("Adafactor", 2)) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [-1.0, "fast", True, None, float("nan")])
def test_wrong_rates_are_the_users_mistake(name: str, value: Any) -> None:
    with pytest.raises(MolsConfigError, match=rf'"optimizer.params.lr" of {name} is .*: give') as caught:
        request(name, lr=value)
    assert "\n" not in str(caught.value)


def test_what_the_library_refuses_is_the_users_mistake() -> None:
    """An exception class of a library."""
    for name, params in (("SOAP", {"precondition_frequency": 0}), ("APOLLO", {"scale_type": "row"}),
                         ("Lamb", {"clamp": -1.0}), ("NAdam", {"momentum_decay": -1.0})):  # fmt: skip
        with pytest.raises(MolsConfigError, match=name) as caught:
            build(request(name, **params), tiny("llama"))
        assert "\n" not in str(caught.value)
    with pytest.raises(MolsConfigError, match=r'"optimizer.params.betas" of SGG is .*: give two numbers in \[0, 1\)'):
        request("SGG", betas=[0.9, 1.0])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(MolsConfigError, match=r"Adam8bit comes from bitsandbytes: pip install bitsandbytes"):
        build(request("Adam8bit"), tiny("llama"))


@pytest.mark.parametrize("name", ["Muon", "GaLore", "APOLLO", "SOAP"])
def test_matrices_and_the_rest(name: str) -> None:
    """Attention and MLP weights in one half; embedding, head, norms in the other; a user's groups keep their own."""
    model = tiny("llama")
    named = dict(model.named_parameters())
    inside = {n for n in named if "proj" in n}
    plain = [p for n, p in named.items() if "norm" not in n]
    norms = [p for n, p in named.items() if "norm" in n]
    groups = [{"params": plain}, {"params": norms, "lr": 0.5, "weight_decay": 0.25}]
    optimizer = build(request(name), model, groups)
    assert len(optimizer.param_groups) == 3
    matrices, rest, vectors = optimizer.param_groups
    assert {id(p) for p in matrices["params"]} == {id(named[n]) for n in inside}
    assert {id(p) for p in rest["params"]} == {id(p) for p in plain} - {id(named[n]) for n in inside}
    assert (vectors["lr"], vectors["weight_decay"], len(vectors["params"])) == (0.5, 0.25, len(norms))
    keys = {"Muon": ("use_muon", True, False), "SOAP": ("max_precondition_dim", 10000, 1)}
    if name in keys:
        key, first, second = keys[name]
        assert (matrices[key], rest[key], vectors[key]) == (first, second, second)
    else:
        assert matrices["rank"] == HIDDEN // 4 and "rank" not in rest and "rank" not in vectors


def test_frozen_parameters_are_left_out() -> None:
    model = tiny("llama")
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(MolsConfigError, match="no trainable parameter"):
        build(request("Lion"), model)


# ---------------------------------------------------------------------- MoLS on top


def engine(optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """Just enough of an engine for check_supported."""
    stub = dict.fromkeys(set(ENGINE_NAMES) - {"optimizer"}, 0)
    stub |= {"zero_optimization": lambda: stage > 0, "managed_gradient_accumulation": lambda: True}
    return SimpleNamespace(optimizer=optimizer, config={}, **{**stub, "module": torch.nn.Module()})


ON_TOP: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("SGDSaI", {}, 0, "probe", r"SGDSaI \(it sets a rate for each tensor"),
    *((n, {}, 2, "probe", r"under ZeRO \(it reads whole tensors .*set \"zero_optimization.stage\": 0")
      for n in ("Adafactor", "SOAP", "GaLore", "APOLLO", "Muon")),
    *((n, {}, 0, "moments", r'mode "moments" with \w+, which keeps no Adam moments')
      for n in ("Lion", "Adam8bit", "AdamMini", "SOAP", "GaLore", "APOLLO", "Adafactor", "Muon")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "stage", "mode", "message"), ON_TOP)
def test_rates_that_are_refused(name: str, params: dict[str, Any], stage: int, mode: str, message: str) -> None:
    """The client's own instance under ZeRO too: the catalog is not asked."""
    optimizer = build(request(name, **params), tiny("llama"))
    section = MolsConfig.parse({"start": 1, "ramp_end": 9, "mode": mode})
    with pytest.raises(MolsUnsupportedError, match=message) as caught:
        check_supported(engine(optimizer, stage), section)
    assert "\n" not in str(caught.value)


def test_clients_of_other_libraries_are_refused() -> None:
    weight, section = [nn.Parameter(torch.ones(3, 4))], MolsConfig.parse({"start": 1, "ramp_end": 9})
    for optimizer, stage, message in (
        (torch.optim.Adafactor(weight), 0, r"Adafactor \(torch's takes min\(lr, 1/sqrt\(t\)\)"),
        (pytorch_optimizer.Lamb(weight), 1, r"Lamb under ZeRO .*Lamb, AdamMini or SGG"),
        (pytorch_optimizer.AdaFactor(weight), 0, r"AdaFactor with relative_step or momentum"),
    ):
        with pytest.raises(MolsUnsupportedError, match=message):
            check_supported(engine(optimizer, stage), section)


@pytest.mark.parametrize("name", [n for n, entry in OPTIMIZERS.items() if not entry.refused])
def test_rates_that_are_not_refused(name: str) -> None:
    optimizer = build(request(name), tiny("llama"))
    stage = 0 if OPTIMIZERS[name].reads == "tensors" else 2
    check_supported(engine(optimizer, stage), MolsConfig.parse({"start": 1, "ramp_end": 9}))


def test_lion_is_stepped_on_views_unless_it_reads_whole_tensors() -> None:
    weight = [nn.Parameter(torch.ones(3))]
    assert is_elementwise(pytorch_optimizer.Lion(weight))
    assert not is_elementwise(pytorch_optimizer.Lion(weight, cautious=True))


# ---------------------------------------------------------------------- the main job's section


def resolved(section: dict[str, Any] | None, stage: int = 0, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"train_batch_size": 4, "zero_optimization": {"stage": stage}}
    if section is not None:
        given["optimizer"] = section
    result = resolve(given, world=1, steps=10, out=Path("runs/x"), **more)["optimizer"]
    assert isinstance(result, dict)
    return result


ADAMW = {"type": "AdamW", "params": {"lr": 4e-3, "betas": [0.9, 0.9], "eps": 1e-7, "torch_adam": True}}


def test_sgg_without_a_clustering_is_said(recwarn: pytest.WarningsRecorder) -> None:
    """Its default interval is 500 steps: a shorter run is Adam's."""
    resolved({"type": "SGG", "params": {"interval": 9}})
    assert not recwarn.list
    with pytest.warns(MolsWarning, match="every 10 steps and this run has 10: it is plain Adam"):
        resolved({"type": "SGG", "params": {"interval": 10}})


def test_another_name_keeps_what_both_have() -> None:
    lion = resolved(ADAMW, optimizer="SOAP", lr=1e-2)
    assert (lion["type"], lion["params"]["lr"], lion["params"]["betas"]) == ("SOAP", 1e-2, (0.9, 0.9))
    assert "torch_adam" not in lion["params"] and lion["params"]["precondition_frequency"] == 10
    factor = resolved(ADAMW, optimizer="adafactor")
    assert factor["source"] == "library" and "betas" not in factor["params"] and factor["params"]["lr"] == 4e-3
    assert resolved(ADAMW, optimizer="adamw") == resolved(ADAMW)
    assert rename({"type": "AdamW", "params": {"lr": 1.0}}, "RMSprop") == {"type": "RMSprop", "params": {"lr": 1.0}}
    assert resolved({"type": "SGG", "params": {"lr": "auto"}})["params"]["lr"] == 1e-3
    assert resolved(None)["type"] == "AdamW"


def test_a_name_that_loses_a_parameter_is_refused() -> None:
    with pytest.raises(MolsConfigError, match=r"--optimizer AdamW has no 'rank', which the config gives to GaLore"):
        resolved({"type": "GaLore", "params": {"lr": 1e-3, "rank": 4}}, optimizer="AdamW")
    with pytest.raises(MolsConfigError, match=r"--optimizer Sopa is unknown; known are"):
        resolved(ADAMW, optimizer="Sopa")
    with pytest.raises(MolsUnsupportedError, match=r"SOAP .*ZeRO stage 2"):
        resolved(ADAMW, 2, optimizer="SOAP")


@pytest.mark.parametrize("name", ["Lion", "Lamb", "Muon"])
def test_a_cpu_gets_the_librarys_and_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(MolsWarning, match=rf"DeepSpeed's {name} needs a CUDA kernel .*{name} of \w+"):
        chosen = resolved(ADAMW, optimizer=name)
    assert chosen["source"] == "library" and chosen["params"]["lr"] == 4e-3
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda self, index=None: "cuda")
    assert "source" not in resolved(ADAMW, optimizer=name), "where it runs, DeepSpeed's own is taken"
