"""The table of optimizers that a config can name: where each comes from, its settings, and what it has to see.

Defaults are those of the comparison in arXiv 2605.05794, Appendix B, and of the paper that it takes a baseline from:
betas (0.9, 0.95), eps 1e-8 and no weight decay for whatever keeps Adam's two moments. docs/optimizers.md says why each
source was chosen.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from mols_ds.errors import MolsConfigError

Reads = Literal["elements", "tensors", "sharded"]
"""What an update of one element reads.

elements: that element's own weight, gradient and state (or those of neighbours in the shard, as 8-bit blocks do): right
on any shard. tensors: the whole parameter as the model has it, so ZeRO stage 0 only. sharded: the whole parameter too,
but this package's version sums over the shards: any stage.
"""

Settings = dict[str, Any]

ADAM: Mapping[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
CARRIED = ("lr", "betas", "eps", "weight_decay")
"""Settings of another optimizer that one keeps, where it has them, when only the name is changed."""
DROPPED = ("torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach", "fused")
"""Settings of DeepSpeed's and torch's Adam that choose a kernel and mean nothing to another optimizer."""


class Halves(NamedTuple):
    """How an optimizer is built that treats the weight matrices inside the blocks apart from all else.

    arguments: of the constructor; matrices, rest: what stands in the parameter groups of either half.
    """

    arguments: Settings
    matrices: Settings
    rest: Settings


Split = Callable[[Settings, int], Halves]
"""(settings, hidden size) -> how the halves are built. Hidden size: see `build.hidden_size`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One optimizer of the table.

    name: as users write it; matched without regard to case, hyphens and underscores, as `aliases` are.
    source: the library, for messages and docs; package: what pip installs ("" = a dependency of this package).
    factory: "module:attribute" of the class, imported when it is first used.
    reads: see `Reads`.
    settings: all that may stand under "params", with defaults.
    fixed: arguments of the constructor that are not settings.
    split: for optimizers that treat the matrices of the blocks apart.
    doubtful: why MoLS on top of it is refused; "" = it is not.
    """

    name: str
    source: str
    factory: str
    reads: Reads
    settings: Mapping[str, Any]
    aliases: tuple[str, ...] = ()
    package: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    split: Split | None = None
    doubtful: str = ""

    def load(self) -> Callable[..., torch.optim.Optimizer]:
        """The optimizer's class. Raises MolsConfigError where its package is not installed."""
        module, _, attribute = self.factory.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
        except ImportError as error:
            way_out = f"pip install {self.package}" if self.package else "update mols-ds"
            raise MolsConfigError(f"optimizer {self.name} comes from {self.source}: {way_out} ({error})") from error


def _muon(settings: Settings, hidden: int) -> Halves:
    """Muon on the matrices, AdamW on the rest, in one object (arXiv 2502.16982 for the update's size)."""
    adam_lr = settings["adam_lr"] if settings["adam_lr"] is not None else settings["lr"]
    shape = {key: settings[key] for key in ("lr", "momentum", "nesterov", "ns_steps", "use_adjusted_lr")}
    rest = {"lr": adam_lr, "betas": settings["betas"], "eps": settings["eps"]}
    decay = {"weight_decay": settings["weight_decay"]}
    return Halves({}, {"use_muon": True, **shape, **decay}, {"use_muon": False, **rest, **decay})


def _soap(settings: Settings, hidden: int) -> Halves:
    """SOAP; the rest gets the identity for a basis, which is Adam (arXiv 2409.11321, section 4)."""
    return Halves(settings, {}, {"max_precondition_dim": 1})


def _low_rank(*keys: str) -> Split:
    """GaLore and APOLLO: `keys` stand in the group of the matrices only; what has no rank is stepped by Adam."""

    def split(settings: Settings, hidden: int) -> Halves:
        rank = settings["rank"] if settings["rank"] is not None else max(1, hidden // 4)
        own = {key: settings[key] for key in keys}
        arguments = {key: value for key, value in settings.items() if key not in keys and key != "rank"}
        return Halves(arguments, {"rank": rank, **own}, {})

    return split


def _collected(name: str, attribute: str, reads: Reads, settings: Settings, **more: Any) -> Entry:
    """An entry whose class is pytorch-optimizer's."""
    return Entry(
        name,
        "pytorch-optimizer",
        f"pytorch_optimizer:{attribute}",
        reads,
        settings,
        package="pytorch-optimizer",
        **more,
    )


def _own(name: str, factory: str, settings: Settings) -> Entry:
    """An entry whose class is this package's and sums over the shards."""
    return Entry(name, "mols_ds", f"mols_ds.optim.{factory}", "sharded", settings)


ENTRIES: tuple[Entry, ...] = (
    Entry("Adam", "torch", "torch.optim:Adam", "elements", {**ADAM, "amsgrad": False}),
    Entry("AdamW", "torch", "torch.optim:AdamW", "elements", {**ADAM, "amsgrad": False}),
    Entry("NAdam", "torch", "torch.optim:NAdam", "elements", {**ADAM, "momentum_decay": 4e-3},
          fixed={"decoupled_weight_decay": True}),
    _collected("Lion", "Lion", "elements", {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}),
    Entry("Adam8bit", "bitsandbytes", "bitsandbytes.optim:AdamW8bit", "elements",
          {**ADAM, "min_8bit_size": 4096}, ("8bit-Adam", "AdamW8bit"), "bitsandbytes"),
    _own("Lamb", "lamb:ShardedLamb", {**ADAM, "eps": 1e-6, "bias_correction": False, "clamp": 10.0}),
    _own("AdamMini", "adam_mini:ShardedAdamMini", {**ADAM, "head_dim": None}),
    _own("SGG", "sgg:SGG", {**ADAM, "clusters": 3, "interval": 500, "beta3": 0.99, "bounds": (0.1, 10.0)}),
    _collected("Muon", "Muon", "tensors", split=_muon,
               settings={**ADAM, "adam_lr": None, "momentum": 0.95, "nesterov": True, "ns_steps": 5,
                         "use_adjusted_lr": True}),
    _collected("SOAP", "SOAP", "tensors", split=_soap,
               settings={**ADAM, "betas": (0.95, 0.95), "shampoo_beta": None, "precondition_frequency": 10,
                         "max_precondition_dim": 10000}),
    _collected("Adafactor", "AdaFactor", "tensors", fixed={"betas": (None, 0.999), "relative_step": False},
               settings={"lr": 1e-3, "weight_decay": 0.0, "decay_rate": -0.8, "clip_threshold": 1.0,
                         "scale_parameter": False, "eps1": 1e-30, "eps2": 1e-3}),
    _collected("GaLore", "GaLore", "tensors", split=_low_rank("update_proj_gap", "scale", "projection_type"),
               settings={**ADAM, "eps": 1e-6, "rank": None, "update_proj_gap": 200, "scale": 0.25,
                         "projection_type": "std"}),
    Entry("APOLLO", "mols_ds", "mols_ds.optim.apollo:Apollo", "tensors",
          {**ADAM, "eps": 1e-6, "rank": None, "update_proj_gap": 200, "scale": 1.0, "scale_type": "channel"},
          split=_low_rank("update_proj_gap", "scale", "scale_type")),
    _collected("SGDSaI", "SGDSaI", "tensors", {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "eps": 1e-8},
               aliases=("SGD-SaI",),
               doubtful="it sets a rate for each tensor from its gradient's signal-to-noise ratio itself"),
)  # fmt: skip


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


_BY_NAME = {_plain(name): entry for entry in ENTRIES for name in (entry.name, *entry.aliases)}
OPTIMIZERS: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
"""Canonical name -> entry."""


def find(name: str) -> Entry | None:
    """The entry of a name or alias; upper and lower case, "-" and "_" make no difference. None where there is none."""
    return _BY_NAME.get(_plain(name))


def known_to_deepspeed(name: str) -> bool:
    """Whether stock DeepSpeed builds this "type" itself: one of its own names, or a class of torch.optim."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    named = getattr(torch.optim, name, None)
    return name.lower() in DEEPSPEED_OPTIMIZERS or (
        isinstance(named, type) and issubclass(named, torch.optim.Optimizer) and named is not torch.optim.Optimizer
    )


def settings_of(entry: Entry, params: Mapping[str, Any]) -> Settings:
    """The entry's settings with the user's values in the place of defaults; "auto" is the default.

    Raises MolsConfigError naming every setting that this optimizer does not have, and a rate, eps, decay or beta out of
    range.
    """
    unknown = [key for key in params if key not in entry.settings]
    if unknown:
        raise MolsConfigError(
            f'"optimizer.params": {entry.name} of {entry.source} has no {", ".join(map(repr, unknown))}; '
            f"it has {', '.join(entry.settings)}"
        )
    given = {key: value for key, value in params.items() if value != "auto"}
    settings = {**entry.settings, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}}
    for key in ("lr", "eps", "weight_decay"):
        value = settings.get(key, 0.0)
        if not _is_number(value) or not 0.0 <= value < math.inf:
            raise MolsConfigError(f'"optimizer.params.{key}" of {entry.name} is {value!r}: give a number >= 0')
    betas = settings.get("betas", ())
    pair = isinstance(betas, tuple) and len(betas) == 2
    if "betas" in settings and not (pair and all(_is_number(b) and 0.0 <= b < 1.0 for b in betas)):
        raise MolsConfigError(f'"optimizer.params.betas" of {entry.name} is {betas!r}: give two numbers in [0, 1)')
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
