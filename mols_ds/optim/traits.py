"""Answer questions about an existing optimizer from the catalog: how to scale its step, what its state contains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.catalog import (
    CLASSES,
    INDEX_TABLES,
    OTHER_STATE,
    PARALLEL_LISTS,
    WHOLE_TENSOR_OPTIONS,
    Decay,
    OptimizerClass,
    class_facts,
)

NOT_IN_A_STEP = {"step", "__init__", "__repr__", "__getstate__", "__setstate__", "state_dict", "load_state_dict",
                 "zero_grad", "add_param_group"}  # fmt: skip
"""Methods that a subclass may define and still step like its parent; `step` is checked separately."""


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether this optimizer may step views of its tensors.

    True for a class that the catalog lists as elementwise, and for a subclass that inherits its `step` and the methods
    that this calls. False with an option that reads whole tensors.
    """
    if any(group.get(option) for group in optimizer.param_groups for option in WHOLE_TENSOR_OPTIONS):
        return False
    return _has_step_of(optimizer, lambda facts: facts.elementwise_in)


def reads_groups_only(optimizer: Optimizer) -> bool:
    """Whether this optimizer's step finds its tensors in `param_groups` alone, so that it may get temporary groups.

    True for a class in the catalog, and for a subclass that inherits its `step` and the methods that this calls. False
    for any other class: it may have lists or tables beside `param_groups` and would silently leave out tensors.
    """
    if _settings_by_index(optimizer):
        return False
    return _has_step_of(optimizer, lambda facts: facts.elementwise_in + facts.groups_only_in)


def _settings_by_index(optimizer: object) -> bool:
    """Whether single tensors have their own settings (bitsandbytes' manager)."""
    manager = getattr(optimizer, "mng", None)
    return any(getattr(manager, table, None) for table in INDEX_TABLES)


def _has_step_of(optimizer: Optimizer, modules: Callable[[OptimizerClass], tuple[str, ...]]) -> bool:
    """Whether the optimizer steps like a catalog class from one of these `modules`."""
    for cls in type(optimizer).__mro__:
        facts = CLASSES.get(cls.__name__)
        if facts is not None and cls.__module__.startswith(modules(facts)):
            return _inherits(type(optimizer), cls)
    return False


def unscaled_refusal(optimizer: object) -> tuple[str, str] | None:
    """Return (what is not supported, what to do instead) with "weight_decay": "unscaled"; None: supported.

    Supported if every step subtracts lr x weight_decay x w, or if every weight_decay is 0.
    """
    for group in getattr(optimizer, "param_groups", []):
        if group.get("weight_decay", 1.0) and (why := _decay_problem(optimizer, group)):
            what = f'"weight_decay": "unscaled" with {type(optimizer).__name__} ({why})'
            return what, 'use "weight_decay": "scaled", weight_decay 0 in the optimizer, or AdamW'
    return None


def unscaled_decay(optimizer: object, weight_decay: str) -> Callable[[], None] | None:
    """Return the check that `LRScaler` runs before each scaled step (settings may change); None if "scaled"."""
    if weight_decay == "scaled":
        return None

    def check() -> None:
        refusal = unscaled_refusal(optimizer)
        if refusal is not None:
            raise MolsUnsupportedError(f"MoLS does not support {refusal[0]}: {refusal[1]}")

    return check


def _decay_problem(optimizer: object, group: Mapping[str, Any]) -> str:
    """Return why the decay of this parameter group is not lr x weight_decay x w beside the update; "": it is."""
    added = adds_decay(optimizer, group)
    if added is None or _settings_by_index(optimizer):
        return "it is not known to subtract lr x weight_decay x w in every step"
    return "its decay is added to the gradient, so it cannot be separated from the update" if added else ""


def adds_decay(optimizer: object, group: Mapping[str, Any]) -> bool | None:
    """Return whether weight_decay x w of this parameter group is added to the gradient (L2); None: unknown."""
    facts = _decay_of(optimizer)
    if facts is None:
        return None
    return not facts.decoupled or bool(facts.flag and not group.get(facts.flag, getattr(optimizer, facts.flag, False)))


def _decay_of(optimizer: object) -> Decay | None:
    """Return the catalog's `Decay` of this class, or of the class whose step it inherits."""
    for cls in type(optimizer).__mro__:
        facts = CLASSES.get(cls.__name__)
        for decay in facts.decays if facts is not None else ():
            if cls.__module__.startswith(decay.modules):
                return decay if _inherits(type(optimizer), cls) else None
    return None


def _inherits(cls: type, known: type) -> bool:
    """Whether `cls`, a subclass of `known`, defines neither `step` nor a method that a step may call."""
    between = cls.__mro__[: cls.__mro__.index(known)]
    own = {name for one in between for name, value in vars(one).items() if callable(value)}
    return _unhooked(cls) is _unhooked(known) and not any(hasattr(known, name) for name in own - NOT_IN_A_STEP)


def parallel_list(optimizer: Optimizer) -> str:
    """Return the name of the list that this optimizer zips with its parameter groups; "": none.

    Raises:
        MolsUnsupportedError: the list has fp32 master weights. Parts of those cannot have their own rate.
    """
    for name in PARALLEL_LISTS:
        entries = getattr(optimizer, name, None)
        if not entries:
            continue
        if any(master is not None for entry in entries for master in entry["params"]):
            raise MolsUnsupportedError(
                f"MoLS does not support {type(optimizer).__name__} with master_weights=True (fp32 copies in {name}): "
                "use master_weights=False, and let DeepSpeed or Megatron keep the fp32 weights"
            )
        return name
    return ""


def _unhooked(cls: type) -> Callable[..., object]:
    """Return the class's `step`, its own or inherited, without the profiler's wrapper.

    torch wraps the first class of a family that is instantiated, and not its subclasses again
    (`Optimizer._patch_step_function`). So Adam or AdamW (a subclass) has the wrapper, depending on the order.
    """
    step = cls.step  # type: ignore[attr-defined]
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def has_shared_counter(optimizer: Optimizer) -> bool:
    """Whether the state of the last tensor of a parameter group counts the steps of the whole group."""
    return class_facts(optimizer).shared_counter


def has_adam_moments(optimizer: object) -> bool:
    """Whether the state has Adam's two moments per element, as exp_avg and exp_avg_sq."""
    if not class_facts(optimizer).adam_moments or type(optimizer).__module__.startswith(OTHER_STATE):
        return False
    betas = [group.get("betas") for group in getattr(optimizer, "param_groups", [])]
    return all(pair is not None and len(pair) == 2 for pair in betas)


def has_several_betas(optimizer: object) -> bool:
    """Whether parameter groups have different betas: mode "moments" corrects all elements by one pair."""
    return len({tuple(group.get("betas") or ()) for group in getattr(optimizer, "param_groups", [])}) > 1
