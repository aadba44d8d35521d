"""The catalog of optimizers: one row each, with every fact about it.

To add an optimizer, add a row to `ENTRIES`. Readers: `build` and `choose` (names and settings), `traits` (how to scale
its step), the engines' checks (what is refused) and `mols-ds plan` (bytes of state).

Defaults come from the comparison in arXiv 2605.05794, Appendix B, and from the papers of its baselines.
docs/optimizers.md gives the reason for each source.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from mols_ds.errors import MolsConfigError
from mols_ds.optim import halves, state_bytes
from mols_ds.optim.settings import ADAM, CARRIED, DROPPED, ReadSettings
from mols_ds.optim.state_bytes import StateBytes, per_element

Reads = Literal["elements", "tensors", "sharded"]
"""What the update of one element reads.

elements: that element's own weight, gradient and state, or those of neighbours in the shard (8-bit blocks). Correct on
any shard. tensors: the whole parameter, so ZeRO stage 0 only. sharded: the whole parameter too, but this package's
class sums over the shards: any stage.
"""

TORCH, DEEPSPEED, APEX, COLLECTED = "torch.optim", "deepspeed.ops", "apex.optimizers", "pytorch_optimizer"
ENGINE, EIGHT_BIT = "transformer_engine", "bitsandbytes"
OURS, EMULATED = "mols_ds.optim", "megatron_patches.cpu"
"""Module prefixes, for `elementwise_in` and `groups_only_in`."""
PACKAGES = {name.split(".")[0] for name in (TORCH, DEEPSPEED, APEX, COLLECTED, ENGINE, EIGHT_BIT, OURS, EMULATED)}
"""Packages whose classes the catalog names."""
PARALLEL_LISTS = ("param_groups_master",)
"""Attributes with a list of one entry per parameter group. The optimizer makes it once and zips both in its step.

In apex's FusedAdam (apex/optimizers/fused_adam.py) and Transformer Engine's of 1.8 and 1.9 each entry is
{"params": [None or an fp32 master weight, ...]}.
"""
INDEX_TABLES = ("index2config", "pid2config", "module_weight_config_triple")
"""Attributes of bitsandbytes' manager: settings of single tensors, by parameter group index and position."""
WHOLE_TENSOR_OPTIONS = ("cautious", "use_gc", "adanorm")
"""Options of pytorch-optimizer's parameter groups, for any class, that make an update read whole tensors."""
OTHER_STATE = (EIGHT_BIT,)
"""Packages whose optimizers name their moments other than exp_avg and exp_avg_sq."""


class Decay(NamedTuple):
    """How the classes of some modules decay weights, by their source code.

    modules: module prefixes.
    decoupled: True: each step of a tensor with a gradient subtracts lr x weight_decay x w, before or after the update.
        False: weight_decay x w is added to the gradient (L2).
    flag: option of a parameter group or attribute of the optimizer that makes it decoupled; "": always.
    """

    modules: tuple[str, ...]
    decoupled: bool = True
    flag: str = ""


class RefusedOptions(NamedTuple):
    """Options of a class that make its step not proportional to lr.

    used: whether a parameter group has them. what: their names and the reason. instead: what to set.
    """

    used: Callable[[ReadSettings], bool]
    what: str
    instead: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerClass:
    """Facts about all classes of one name. Many packages have a copy of the same optimizer.

    name: of the class.
    reads: see `Reads`.
    elementwise_in: module prefixes. A class from there may step views of its tensors: the update of an element reads
        only that element's weight, gradient and state.
    groups_only_in: more module prefixes. The step of a class from there finds its tensors and settings in
        `param_groups` alone, whose number may change between steps, or in one of `PARALLEL_LISTS`.
    shared_counter: one step counter per parameter group, in the state of its last tensor.
    adam_moments: two betas mean Adam's moments of each element in exp_avg and exp_avg_sq.
    decays: see `Decay`; unknown for classes of other modules.
    refused: why its lr cannot give a rate per module; "": it can. instead: what to use.
    refused_options: options that make it impossible.
    """

    name: str
    reads: Reads = "elements"
    elementwise_in: tuple[str, ...] = ()
    groups_only_in: tuple[str, ...] = ()
    shared_counter: bool = False
    adam_moments: bool = True
    decays: tuple[Decay, ...] = ()
    refused: str = ""
    instead: str = "use Adam, AdamW, SGD, Lion, ..."
    refused_options: RefusedOptions | None = None

    def refusal(self, groups: Iterable[ReadSettings]) -> tuple[str, str] | None:
        """Return (what MoLS does not support, what to do instead) for these parameter groups; None: supported."""
        if self.refused:
            return f"{self.name} ({self.refused})", self.instead
        if any(group.get("fixed_decay") and group.get("weight_decay") for group in groups):
            return f"{self.name} with fixed_decay (lr is not what its decay is multiplied by)", "set fixed_decay=False"
        options = self.refused_options
        if options is not None and any(options.used(group) for group in groups):
            return f"{self.name} with {options.what}", options.instead
        return None


@dataclass(frozen=True, slots=True)
class DeepSpeedVersion:
    """DeepSpeed's own version of an optimizer (runtime/engine.py, 0.19).

    parameters: all allowed keys of "params".
    on_cpu: where it runs on a CPU: "offloaded": only with offload_optimizer; "sharded": only from ZeRO stage 1 on.
    """

    parameters: tuple[str, ...]
    on_cpu: Literal["always", "offloaded", "sharded", "never"] = "always"


@dataclass(frozen=True, slots=True)
class Entry:
    """One optimizer of the catalog.

    name: as users write it. Case, hyphens and underscores do not matter, also in `aliases`.
    classes: its classes, in any package.
    source: library of the class, for messages and docs; "": this package does not build it.
    factory: "module:attribute" of the class, imported at first use.
    settings: all allowed keys of "params", with defaults. fixed: constructor arguments that are not settings.
    split: for optimizers that treat block matrices separately.
    swappable: DeepSpeed can swap its state to NVMe, where it assumes the size of the weights.
    state: bytes of its state; None: unknown.
    deepspeed: DeepSpeed's own version, where that is the default.
    cut_by_deepspeed: DeepSpeed builds one by this name that needs whole tensors, and gives it flat shards.
    megatron: value of OptimizerConfig.optimizer, if MoLS can scale Megatron-core's optimizer; "": it cannot.
    """

    name: str
    source: str = ""
    factory: str = ""
    settings: ReadSettings = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    classes: tuple[OptimizerClass, ...] = ()
    fixed: ReadSettings = field(default_factory=dict)
    split: halves.Split | None = None
    swappable: bool = True
    state: StateBytes | None = None
    deepspeed: DeepSpeedVersion | None = None
    cut_by_deepspeed: bool = False
    megatron: str = ""

    @property
    def package(self) -> str:
        """Name for pip; "": a dependency of this package."""
        return "" if self.source in ("torch", "mols_ds") else self.source

    @property
    def built(self) -> OptimizerClass:
        """Facts about the class that this package builds."""
        attribute = self.factory.partition(":")[2]
        return next(kind for kind in self.classes if kind.name == attribute)

    @property
    def reads(self) -> Reads:
        """What an update of the built class reads."""
        return self.built.reads

    @property
    def refused(self) -> str:
        """Why MoLS refuses the built class; "": it does not."""
        return self.built.refused

    def load(self) -> Callable[..., torch.optim.Optimizer]:
        """Import the optimizer's class. Raises MolsConfigError if its package is not installed."""
        module, _, attribute = self.factory.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
        except ImportError as error:
            remedy = f"pip install {self.package}" if self.package else "update mols-ds"
            raise MolsConfigError(f"optimizer {self.name} comes from {self.source}: {remedy} ({error})") from error


def _elementwise(name: str, *modules: str, **facts: Any) -> OptimizerClass:
    """A class that may step views if it is from one of these modules."""
    return OptimizerClass(name=name, elementwise_in=modules, **facts)


def _tensors(*names: str, **facts: Any) -> tuple[OptimizerClass, ...]:
    """Classes whose update reads whole parameters (a norm, a mean, a matrix)."""
    anywhere = (TORCH, DEEPSPEED, COLLECTED, OURS)
    return tuple(OptimizerClass(name=name, reads="tensors", groups_only_in=anywhere, **facts) for name in names)


def _refused(reason: str, *names: str) -> tuple[OptimizerClass, ...]:
    """Classes whose lr cannot give a rate per module."""
    return tuple(OptimizerClass(name=name, refused=reason) for name in names)


def _adafactor_keeps_lr(group: ReadSettings) -> bool:
    """Whether pytorch-optimizer's AdaFactor sets its own rate, or its momentum contains past rates."""
    return bool(group.get("relative_step", True)) or group["betas"][0] is not None


_DEEPSPEEDS_ADAM = DeepSpeedVersion((*CARRIED, "bias_correction", "amsgrad", *DROPPED))
_OWN_RATE = "it finds its own rate"
_SCHEDULE_FREE = "the weights that it steps are not those that the model has"
_COUPLED = (Decay((TORCH,), decoupled=False),)
_BY_OPTION = (Decay((TORCH,), flag="decoupled_weight_decay"),)

ENTRIES: tuple[Entry, ...] = (
    # ---- elementwise
    Entry("Adam", "torch", "torch.optim:Adam", {**ADAM, "amsgrad": False}, state=per_element(8),
          deepspeed=_DEEPSPEEDS_ADAM, megatron="adam",
          # Transformer Engine's FusedAdam may keep scaled moments below fp32: not stepped on views.
          classes=(_elementwise("Adam", TORCH, decays=_BY_OPTION),
                   _elementwise("FusedAdam", DEEPSPEED, APEX, shared_counter=True, groups_only_in=(ENGINE,),
                                decays=(Decay((DEEPSPEED, APEX, ENGINE), flag="adam_w_mode"),)),
                   OptimizerClass(name="CpuFusedAdam", groups_only_in=(EMULATED,),
                                  decays=(Decay((EMULATED,), flag="adam_w_mode"),)),
                   _elementwise("DeepSpeedCPUAdam", DEEPSPEED, decays=(Decay((DEEPSPEED,), flag="adam_w_mode"),)))),
    Entry("AdamW", "torch", "torch.optim:AdamW", {**ADAM, "amsgrad": False}, state=per_element(8),
          deepspeed=_DEEPSPEEDS_ADAM, classes=(_elementwise("AdamW", TORCH, decays=(Decay((TORCH,)),)),)),
    Entry("NAdam", "torch", "torch.optim:NAdam", {**ADAM, "momentum_decay": 4e-3}, state=per_element(8),
          fixed={"decoupled_weight_decay": True}, classes=(_elementwise("NAdam", TORCH, decays=_BY_OPTION),)),
    Entry("RAdam", state=per_element(8), classes=(_elementwise("RAdam", TORCH, decays=_BY_OPTION),)),
    Entry("Adamax", state=per_element(8),
          classes=(_elementwise("Adamax", TORCH, adam_moments=False, decays=_COUPLED),)),
    Entry("Adagrad", state=per_element(4),
          classes=(_elementwise("Adagrad", TORCH, decays=_COUPLED),
                   _elementwise("FusedAdagrad", APEX, decays=(Decay((APEX,), flag="adagrad_w_mode"),)),
                   _elementwise("DeepSpeedCPUAdagrad", DEEPSPEED, decays=(Decay((DEEPSPEED,), decoupled=False),)))),
    Entry("RMSprop", state=per_element(4), classes=(_elementwise("RMSprop", TORCH, decays=_COUPLED),)),
    Entry("SGD", state=state_bytes.sgd, megatron="sgd",
          classes=(_elementwise("SGD", TORCH, decays=_COUPLED),
                   _elementwise("FusedSGD", APEX, ENGINE, decays=(Decay((APEX, ENGINE), decoupled=False),)))),
    Entry("Adadelta", classes=(_elementwise("Adadelta", TORCH, decays=_COUPLED),)),
    Entry("Lion", "pytorch-optimizer", "pytorch_optimizer:Lion",
          {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}, state=per_element(4),
          deepspeed=DeepSpeedVersion(("lr", "betas", "weight_decay"), on_cpu="offloaded"), megatron="lion",
          classes=(_elementwise("Lion", COLLECTED, adam_moments=False,
                                decays=(Decay((COLLECTED,), flag="weight_decouple"),)),
                   _elementwise("FusedLion", DEEPSPEED, shared_counter=True, adam_moments=False,
                                decays=(Decay((DEEPSPEED,)),)),
                   _elementwise("DeepSpeedCPULion", DEEPSPEED, adam_moments=False, decays=(Decay((DEEPSPEED,)),)))),
    Entry("Adam8bit", "bitsandbytes", "bitsandbytes.optim:AdamW8bit", {**ADAM, "min_8bit_size": 4096},
          ("AdamW8bit", "8bit-Adam"), state=state_bytes.eight_bit, swappable=False,
          classes=(OptimizerClass(name="AdamW8bit", groups_only_in=(EIGHT_BIT,), decays=(Decay((EIGHT_BIT,)),)),)),
    # ---- one or a few numbers per parameter
    Entry("Lamb", "mols_ds", "mols_ds.optim.lamb:ShardedLamb",
          {**ADAM, "eps": 1e-6, "bias_correction": False, "clamp": 10.0}, state=per_element(8),
          deepspeed=DeepSpeedVersion(
              (*CARRIED, "bias_correction", "eps_inside_sqrt", "max_coeff", "min_coeff", "amsgrad"), on_cpu="never"),
          cut_by_deepspeed=True,
          classes=(OptimizerClass(name="ShardedLamb", reads="sharded", groups_only_in=(OURS,)),
                   *_tensors("Lamb", "LAMB", "FusedLamb"))),
    Entry("AdamMini", "mols_ds", "mols_ds.optim.adam_mini:ShardedAdamMini", {**ADAM, "head_dim": None},
          state=per_element(4),  # without the second moment: one number per block
          classes=(OptimizerClass(
                       name="ShardedAdamMini", reads="sharded", adam_moments=False, groups_only_in=(OURS,),
                       decays=(Decay((OURS,)),)),
                   *_tensors("AdamMini", "Adam_mini", adam_moments=False))),
    Entry("SGG", "mols_ds", "mols_ds.optim.sgg:SGG",
          {**ADAM, "clusters": 3, "interval": 500, "beta3": 0.99, "bounds": (0.1, 10.0)}, state=per_element(8),
          classes=(OptimizerClass(name="SGG", reads="sharded", groups_only_in=(OURS,), decays=(Decay((OURS,)),)),)),
    # ---- matrices
    Entry("Muon", "pytorch-optimizer", "pytorch_optimizer:Muon",
          {**ADAM, "adam_lr": None, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "use_adjusted_lr": True},
          split=halves.muon, state=state_bytes.muon, classes=_tensors("Muon", adam_moments=False),
          # DeepSpeed's handles shards: it orthogonalises before it splits. Its Adam half needs a CPU kernel or torch's.
          deepspeed=DeepSpeedVersion(
              (*CARRIED, "momentum", "ns_method", "muon_lr", "adam_lr", *DROPPED), on_cpu="sharded")),
    Entry("SOAP", "pytorch-optimizer", "pytorch_optimizer:SOAP",
          {**ADAM, "betas": (0.95, 0.95), "shampoo_beta": None, "precondition_frequency": 10,
           "max_precondition_dim": 10000},
          split=halves.soap, state=state_bytes.soap, classes=_tensors("SOAP", adam_moments=False)),
    Entry("Adafactor", "pytorch-optimizer", "pytorch_optimizer:AdaFactor",
          {"lr": 1e-3, "weight_decay": 0.0, "decay_rate": -0.8, "clip_threshold": 1.0, "scale_parameter": False,
           "eps1": 1e-30, "eps2": 1e-3},
          fixed={"betas": (None, 0.999), "relative_step": False}, state=state_bytes.adafactor, cut_by_deepspeed=True,
          classes=(
              OptimizerClass(
                  name="AdaFactor", reads="tensors", adam_moments=False, groups_only_in=(COLLECTED,),
                  refused_options=RefusedOptions(
                      _adafactor_keeps_lr, "relative_step or momentum (lr is not what its step is multiplied by)",
                      "set relative_step=False and betas=(None, beta2)")),
              OptimizerClass(
                  name="Adafactor", reads="tensors",
                  refused="torch's takes min(lr, 1/sqrt(t)) for the rate, which is not proportional to lr"))),
    Entry("GaLore", "pytorch-optimizer", "pytorch_optimizer:GaLore",
          {**ADAM, "eps": 1e-6, "rank": None, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"},
          split=halves.low_rank("update_proj_gap", "scale", "projection_type"), state=state_bytes.low_rank,
          classes=(*_tensors("GaLore", adam_moments=False, decays=(Decay((COLLECTED,)),)),
                   *_tensors("GaLoreAdamW", adam_moments=False))),
    Entry("APOLLO", "mols_ds", "mols_ds.optim.apollo:Apollo",
          {**ADAM, "eps": 1e-6, "rank": None, "update_proj_gap": 200, "scale": 1.0, "scale_type": "channel"},
          split=halves.low_rank("update_proj_gap", "scale", "scale_type"), state=state_bytes.low_rank,
          classes=(*_tensors("Apollo", "APOLLO", adam_moments=False, decays=(Decay((OURS,)),)),
                   *_tensors("APOLLOAdamW", adam_moments=False))),
    Entry("SGDSaI", "pytorch-optimizer", "pytorch_optimizer:SGDSaI",
          {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "eps": 1e-8}, ("SGD-SaI",), state=per_element(4),
          classes=(OptimizerClass(
              name="SGDSaI", reads="tensors",
              refused="it sets a rate for each tensor from its gradient's signal-to-noise ratio itself"),)),
    # ---- known by class name only
    Entry("Shampoo", classes=_tensors("Shampoo", "ScalableShampoo", adam_moments=False)),
    Entry("PSGD", classes=_tensors("PSGD", "Kron", adam_moments=False)),
    *(Entry(name, classes=_tensors(name, adam_moments=False)) for name in (
        "CAME", "SM3", "SPlus", "Fira", "Conda", "AdaMuon", "NorMuon", "DistributedMuon", "AdaGO", "MuonClip", "Scion",
        "LARS", "NovoGrad", "Fromage", "Nero")),
    *(Entry(name, classes=_refused("its step is not proportional to lr", name)) for name in ("Rprop", "ASGD", "LBFGS")),
    Entry("Prodigy", classes=_refused(_OWN_RATE, "Prodigy")),
    Entry("D-Adaptation", classes=(
        *_refused(_OWN_RATE, "DAdaptAdam", "DAdaptSGD", "DAdaptAdaGrad", "DAdaptAdan"),
        OptimizerClass(name="DAdaptLion", refused=_OWN_RATE, adam_moments=False))),
    Entry("Schedule-free", classes=_refused(
        _SCHEDULE_FREE, "ScheduleFreeAdamW", "AdamWScheduleFree", "ScheduleFreeSGD", "SGDScheduleFree",
        "ScheduleFreeRAdam")),
    Entry("Wrappers", classes=(
        *_refused("it moves the weights to an average of past ones", "Lookahead", "Ranger", "Ranger21"),
        *_refused(_SCHEDULE_FREE, "ScheduleFreeWrapper"),
        *_refused(_OWN_RATE, "TRAC"),
        *_refused("it steps twice in a batch, once away from the weights", "SAM", "GSAM", "WSAM", "LookSAM", "BSAM",
                  "FriendlySAM"),
        *_refused("its step does nothing: hooks step each weight in the backward pass",
                  "LayerWiseDummyOptimizer"))),
    Entry("1-bit", classes=tuple(
        OptimizerClass(name=name, refused="its step communicates and freezes the variance", instead="use Adam or AdamW")
        for name in ("OneBitAdam", "OneBitLamb", "ZeroOneAdam"))),
)  # fmt: skip


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


NAMES: dict[str, Entry] = {_plain(name): entry for entry in ENTRIES for name in (entry.name, *entry.aliases)}
"""Name or alias in lower case, without "-" and "_" -> entry."""
CLASSES: dict[str, OptimizerClass] = {kind.name: kind for entry in ENTRIES for kind in entry.classes}
"""Name of a class -> facts about it."""
OPTIMIZERS: dict[str, Entry] = {entry.name: entry for entry in ENTRIES if entry.factory}
"""Canonical name -> entry, of those that this package builds."""
MEGATRON: tuple[str, ...] = tuple(entry.megatron for entry in ENTRIES if entry.megatron)
"""Values of Megatron-core's OptimizerConfig.optimizer that MoLS can scale."""


def row_of(name: str) -> Entry | None:
    """Return the entry of a name or alias, without regard to case, "-" and "_"; None if unknown."""
    return NAMES.get(_plain(name))


def find(name: str) -> Entry | None:
    """As `row_of`, but None if this package does not build the optimizer."""
    entry = row_of(name)
    return entry if entry is not None and entry.factory else None


def class_facts(optimizer: object) -> OptimizerClass:
    """Return the facts about an optimizer's class by its name. An unknown class is assumed to be elementwise."""
    name = type(optimizer).__name__
    return CLASSES.get(name) or OptimizerClass(name=name, adam_moments="Lion" not in name)


def known_to_deepspeed(name: str) -> bool:
    """Whether stock DeepSpeed builds this "type": its own names, or a class of torch.optim."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    named = getattr(torch.optim, name, None)
    return name.lower() in DEEPSPEED_OPTIMIZERS or (
        isinstance(named, type) and issubclass(named, torch.optim.Optimizer) and named is not torch.optim.Optimizer
    )
