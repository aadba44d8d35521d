"""Every fact of the catalog against tables that were written down from release 0.4.0."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mols_ds.apps.plan.optimizers import Weight, state_bytes
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.catalog import ENTRIES, OPTIMIZERS, find, row_of
from mols_ds.optim.traits import has_shared_counter, is_elementwise
from tests.helpers.optimizer_facts import CLASSES, MODULES, Facts, stand_in

# ---------------------------------------------------------------------- classes


@pytest.mark.parametrize("facts", CLASSES, ids=lambda facts: facts.name)
def test_what_is_stepped_on_views(facts: Facts) -> None:
    for package in MODULES:
        optimizer = stand_in(facts.name, package)
        assert is_elementwise(optimizer) == (package in facts.elementwise_in), package
        assert has_shared_counter(optimizer) == facts.shared_counter, package


@pytest.mark.parametrize("facts", [f for f in CLASSES if f.elementwise_in], ids=lambda facts: facts.name)
def test_what_keeps_an_elementwise_class_whole(facts: Facts) -> None:
    """An option that reads whole tensors, or a subclass with its own step; a subclass without one is fine."""
    for package in facts.elementwise_in:
        for option in ("cautious", "use_gc", "adanorm"):
            assert not is_elementwise(stand_in(facts.name, package, **{option: True}))
            assert is_elementwise(stand_in(facts.name, package, **{option: False}))
        parent = type(stand_in(facts.name, package))
        inherits = type("Mine", (parent,), {"__module__": "elsewhere"})()
        overrides = type("Mine", (parent,), {"__module__": "elsewhere", "step": lambda self: None})()
        assert is_elementwise(inherits) and not is_elementwise(overrides)


@pytest.mark.parametrize("order", list(itertools.permutations(["Adam", "AdamW", "Inherits", "Overrides"])))
def test_the_order_in_which_a_family_is_built_does_not_matter(order: tuple[str, ...]) -> None:
    """torch wraps `step` of the first class of a family that is built: torch.optim.AdamW is a subclass of Adam."""

    def step(self: Any, closure: Any = None) -> None:
        """Steps nothing."""

    def family(name: str, parent: Any, package: str, **own: Any) -> Any:
        return type(name, (parent,), {"__module__": MODULES[package], **own})

    adam = family("Adam", torch.optim.Optimizer, "torch", step=step)
    adamw = family("AdamW", adam, "torch")
    kinds = {"Adam": adam, "AdamW": adamw, "Inherits": family("Inherits", adamw, "elsewhere")}
    kinds["Overrides"] = family("Overrides", adamw, "elsewhere", step=lambda self, closure=None: None)
    built = {name: kinds[name]([torch.nn.Parameter(torch.ones(2))], {}) for name in order}
    assert {name: is_elementwise(optimizer) for name, optimizer in built.items()} == {
        "Adam": True, "AdamW": True, "Inherits": True, "Overrides": False
    }  # fmt: skip


def test_an_unknown_class_is_not_stepped_on_views() -> None:
    for package in MODULES:
        assert not is_elementwise(stand_in("Sophia", package)) and not has_shared_counter(stand_in("Sophia", package))


def test_each_class_and_each_name_is_in_one_row() -> None:
    classes = [kind.name for entry in ENTRIES for kind in entry.classes]
    assert sorted(classes) == sorted(facts.name for facts in CLASSES)
    for entry in ENTRIES:
        assert all(row_of(name) is entry for name in (entry.name, *entry.aliases)), "two rows answer to one name"
    for entry in OPTIMIZERS.values():
        assert entry.built.name == entry.factory.split(":")[1], "a row that is built has facts about its class"


# ---------------------------------------------------------------------- names and settings

BUILT = """
Adam      | torch             | torch.optim:Adam                        | elements
AdamW     | torch             | torch.optim:AdamW                       | elements
NAdam     | torch             | torch.optim:NAdam                       | elements
Lion      | pytorch-optimizer | pytorch_optimizer:Lion                  | elements
Adam8bit  | bitsandbytes      | bitsandbytes.optim:AdamW8bit            | elements
Lamb      | mols_ds           | mols_ds.optim.lamb:ShardedLamb          | sharded
AdamMini  | mols_ds           | mols_ds.optim.adam_mini:ShardedAdamMini | sharded
SGG       | mols_ds           | mols_ds.optim.sgg:SGG                   | sharded
Muon      | pytorch-optimizer | pytorch_optimizer:Muon                  | tensors
SOAP      | pytorch-optimizer | pytorch_optimizer:SOAP                  | tensors
Adafactor | pytorch-optimizer | pytorch_optimizer:AdaFactor             | tensors
GaLore    | pytorch-optimizer | pytorch_optimizer:GaLore                | tensors
APOLLO    | mols_ds           | mols_ds.optim.apollo:Apollo             | tensors
SGDSaI    | pytorch-optimizer | pytorch_optimizer:SGDSaI                | tensors
"""
"""Name, where the class is from, the class, what it reads. In the order of messages."""
FIXED = {
    "NAdam": {"decoupled_weight_decay": True},
    "Adafactor": {"betas": (None, 0.999), "relative_step": False},
}
"""Arguments of the constructor that are no settings."""

ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
LOW_RANK = {**ADAM, "eps": 1e-6, "rank": None, "update_proj_gap": 200}
SETTINGS: dict[str, dict[str, Any]] = {
    "Adam": {**ADAM, "amsgrad": False},
    "AdamW": {**ADAM, "amsgrad": False},
    "NAdam": {**ADAM, "momentum_decay": 0.004},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    "Adam8bit": {**ADAM, "min_8bit_size": 4096},
    "Lamb": {**ADAM, "eps": 1e-6, "bias_correction": False, "clamp": 10.0},
    "AdamMini": {**ADAM, "head_dim": None},
    "SGG": {**ADAM, "clusters": 3, "interval": 500, "beta3": 0.99, "bounds": (0.1, 10.0)},
    "Muon": {**ADAM, "adam_lr": None, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "use_adjusted_lr": True},
    "SOAP": {**ADAM, "betas": (0.95, 0.95), "shampoo_beta": None, "precondition_frequency": 10,
             "max_precondition_dim": 10000},
    "Adafactor": {"lr": 1e-3, "weight_decay": 0.0, "decay_rate": -0.8, "clip_threshold": 1.0,
                  "scale_parameter": False, "eps1": 1e-30, "eps2": 1e-3},
    "GaLore": {**LOW_RANK, "scale": 0.25, "projection_type": "std"},
    "APOLLO": {**LOW_RANK, "scale": 1.0, "scale_type": "channel"},
    "SGDSaI": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "eps": 1e-8},
}  # fmt: skip

LOW_RANK_ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0}
MUON = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "use_adjusted_lr": True}
HALVES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Muon": ({}, {"use_muon": True, "lr": 1e-3, **MUON, "weight_decay": 0.0}, {"use_muon": False, **ADAM}),
    "SOAP": (SETTINGS["SOAP"], {}, {"max_precondition_dim": 1}),
    "GaLore": (LOW_RANK_ADAM, {"rank": 8, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}, {}),
    "APOLLO": (LOW_RANK_ADAM, {"rank": 8, "update_proj_gap": 200, "scale": 1.0, "scale_type": "channel"}, {}),
}
"""At hidden size 32: arguments of the constructor, settings of the matrices' groups, of the other groups."""


def test_what_the_package_builds() -> None:
    lines = [[part.strip() for part in line.split("|")] for line in BUILT.strip().splitlines()]
    assert list(OPTIMIZERS) == [line[0] for line in lines] == list(SETTINGS)
    for name, source, factory, reads in lines:
        entry = OPTIMIZERS[name]
        assert (entry.name, entry.source, entry.factory, entry.reads) == (name, source, factory, reads)
        assert entry.package == (source if source in ("pytorch-optimizer", "bitsandbytes") else "")
        assert dict(entry.fixed) == FIXED.get(name, {})
        assert list(entry.settings.items()) == list(SETTINGS[name].items()), "order is that of messages"
        assert bool(entry.refused) == (name == "SGDSaI")
        split = entry.split({**entry.settings}, 32) if entry.split is not None else None
        assert split == HALVES.get(name)


def test_other_spellings() -> None:
    for given, name in (("8BIT_adam", "Adam8bit"), ("adamw8bit", "Adam8bit"), ("Adam-Mini", "AdamMini"),
                        ("sgd_sai", "SGDSaI"), ("galore", "GaLore")):  # fmt: skip
        entry = find(given)
        assert entry is not None and entry.name == name
    aliases = {"Adam8bit": {"8bit-Adam", "AdamW8bit"}, "SGDSaI": {"SGD-SaI"}}
    assert {entry.name: set(entry.aliases) for entry in OPTIMIZERS.values() if entry.aliases} == aliases
    for name in (
        "SGD",
        "RAdam",
        "Adamax",
        "Adagrad",
        "RMSprop",
        "Adadelta",
        "Rprop",
        "Prodigy",
        "Shampoo",
        "FusedAdam",
    ):
        assert find(name) is None, f"{name} is torch's or another library's: this package does not build it"


# ---------------------------------------------------------------------- bytes of state

WEIGHTS = (
    Weight("w", (64, 48), "mlp"),
    Weight("b", (48,), "other"),
    Weight("e", (100, 48), "embedding"),
    Weight("x", (4, 16, 8), "mlp"),
    Weight("q", (96, 96), "qk"),
)
STATE = {
    **dict.fromkeys(("adam", "adamw", "nadam", "radam", "adamax", "lamb", "sgg"), (24576, 384, 38400, 4096, 73728)),
    **dict.fromkeys(("lion", "adagrad", "rmsprop", "adammini", "sgdsai"), (12288, 192, 19200, 2048, 36864)),
    **dict.fromkeys(("adam8bit", "adamw8bit", "8bitadam"), (24576, 384, 9752, 4096, 18720)),
    **dict.fromkeys(("galore", "apollo"), (704, 384, 38400, 4096, 1152)),
    "sgd": (0, 0, 0, 0, 0),
    "muon": (12288, 384, 38400, 2048, 36864),
    "soap": (75776, 384, 38400, 6784, 221184),
    "adafactor": (448, 192, 592, 384, 768),
}


@pytest.mark.parametrize("name", STATE)
def test_bytes_of_state(name: str) -> None:
    assert tuple(state_bytes(name, {}, [weight]) for weight in WEIGHTS) == STATE[name]
    assert state_bytes(f"{name[:2].upper()}-{name[2:]}", {}, WEIGHTS) == sum(STATE[name])


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("sgd", {"momentum": 0.9}, 12288),
        ("adam8bit", {"min_8bit_size": 1000}, 6240),
        ("galore", {"rank": 8}, 5632),
        ("apollo", {"hidden": 128}, 22528),
        ("soap", {"max_precondition_dim": 50}, 43008),
    ],
)
def test_settings_that_change_the_state(name: str, settings: dict[str, Any], size: int) -> None:
    assert state_bytes(name, settings, WEIGHTS[:1]) == size


@pytest.mark.parametrize("name", ["Adadelta", "Rprop", "Shampoo", "FusedAdam", "Sophia", "OneBitAdam"])
def test_state_that_is_not_known(name: str) -> None:
    with pytest.raises(MolsUnsupportedError, match=rf'the state of optimizer "{name}" is unknown; known are ') as found:
        state_bytes(name, {}, [])
    assert set(str(found.value).split("known are ")[1].split(", ")) == set(STATE)
