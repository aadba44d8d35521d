"""Entry points: `attach` for an existing optimizer, `apply` for a training script that builds its own."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

from torch import nn

from megatron_patches.compat import APPLIED, ATTACHED, check_modules, check_version, optimizer_classes
from megatron_patches.engine import MegatronMols
from megatron_patches.off import MegatronOff
from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
from mols_ds.core.rank_checks import same_everywhere, together
from mols_ds.errors import MolsConfigError, MolsError


def attach(
    model_chunks: nn.Module | Sequence[nn.Module],
    optimizer: object,
    scheduler: object,
    config: Mapping[str, object] | MolsConfig,
    *,
    samples_per_step: int | None = None,
    force: bool = False,
) -> Handle:
    """Attach MoLS to a Megatron optimizer. Collective: call it on every rank at the same point.

    Patches only the given instances. Call it after building the optimizer and before loading a checkpoint.

    Args:
        model_chunks: this rank's chunks, from which the optimizer was built (a list, or a single module).
        optimizer: from `megatron.core.optimizer.get_megatron_optimizer`.
        scheduler: Megatron's OptimizerParamScheduler, for the number of steps and warm-up steps; or None.
        config: a "mols" section (dict) or a `MolsConfig`.
        samples_per_step: increment passed to `scheduler.step()`, see `megatron_patches.schedule.scheduler_hints`.
        force: attach to a megatron-core outside the tested range.

    Returns:
        The handle, also `optimizer.mols`. Its `detach()` restores the stock optimizer.

    Raises:
        MolsConfigError: a wrong section, rule, group name or model config, or training is past the start.
        MolsUnsupportedError: an unsupported version, optimizer or setting. The message names it and the fix.
        MolsError: an element is not counted exactly once over all ranks, or MoLS is already attached.
    """

    def check() -> list[str]:
        section = MolsConfig.parse(config)
        check_version(force)
        check_modules(ATTACHED)
        if isinstance(getattr(optimizer, "mols", None), MegatronMols):
            raise MolsError("this optimizer has MoLS already; call optimizer.mols.detach() first")
        return [section.model_dump_json(exclude={"report_dir"})]

    same_everywhere(together(check), ['the "mols" section'])
    section = MolsConfig.parse(config)
    if isinstance(getattr(optimizer, "mols", None), MegatronOff):
        optimizer.mols.detach()  # type: ignore[attr-defined]
    if not section.enabled:
        return _off(optimizer)
    chunks = [model_chunks] if isinstance(model_chunks, nn.Module) else list(model_chunks)
    mols = MegatronMols(chunks, optimizer, scheduler, section, samples_per_step)
    _ours.add(optimizer)
    return mols


def _off(optimizer: Any) -> Handle:
    if not hasattr(optimizer, "chained_optimizers"):  # not a ChainedOptimizer
        return Handle()
    optimizer.mols = MegatronOff(optimizer)
    _ours.add(optimizer)
    return optimizer.mols  # type: ignore[no-any-return]


_CHUNKS = "_mols_chunks"
"""Attribute of an optimizer that is not attached yet: its model chunks."""


Method = Callable[..., Any]
"""A function or method of Megatron, or its replacement."""


class _Applied:
    """The patches of `apply` in megatron.core."""

    def __init__(self, config: MolsConfig, samples_per_step: int | None, force: bool) -> None:
        self.config, self.samples_per_step, self.force = config, samples_per_step, force
        self.patches = contextlib.ExitStack()
        self.chunks: list[nn.Module] = []
        self.open = False  # whether an optimizer is being built from `chunks`

    def install(self) -> None:
        from megatron.core import dist_checkpointing, optimizer

        chained, scheduler = optimizer_classes()
        self._replace(optimizer, "_get_param_groups", self._note_chunks)
        self._replace(chained, "__init__", self._note_optimizer)
        self._replace(scheduler, "__init__", self._note_scheduler)
        for name in ("step", "sharded_state_dict", "load_state_dict"):
            self._replace(chained, name, functools.partial(self._attach_late, name))
        self._replace(dist_checkpointing, "load", self._ask_for_samples)

    def _replace(self, owner: ModuleType | type, name: str, call: Method) -> None:
        """Let `owner.name` call `call` with the stock function as its first argument."""
        stock = getattr(owner, name)

        @functools.wraps(stock)
        def replacement(*args: Any, **kwargs: Any) -> object:
            return call(stock, *args, **kwargs)

        self.patches.enter_context(mock.patch.object(owner, name, replacement))

    # ------------------------------------------------------------------ the replacements

    def _note_chunks(self, stock: Method, model_chunks: Sequence[nn.Module], *args: Any, **kwargs: Any) -> object:
        if not self.open:
            self.chunks, self.open = [], True
        known = {id(chunk) for chunk in self.chunks}
        self.chunks += [chunk for chunk in model_chunks if id(chunk) not in known]
        return stock(model_chunks, *args, **kwargs)

    def _note_optimizer(self, stock: Method, chained: object, *args: Any, **kwargs: Any) -> None:
        stock(chained, *args, **kwargs)
        self.open = False
        setattr(chained, _CHUNKS, list(self.chunks))

    def _note_scheduler(self, stock: Method, scheduler: object, optimizer: object, *args: Any, **kwargs: Any) -> None:
        stock(scheduler, optimizer, *args, **kwargs)
        if self.open and not hasattr(optimizer, _CHUNKS):  # not a ChainedOptimizer: attach() raises
            setattr(optimizer, _CHUNKS, list(self.chunks))
        self._attach(optimizer, scheduler)

    def _attach_late(self, name: str, stock: Method, chained: object, *args: Any, **kwargs: Any) -> object:
        """Attach in a script without Megatron's scheduler: on loading a checkpoint, or at the first step."""
        if self._attach(chained, None):
            return getattr(chained, name)(*args, **kwargs)
        return stock(chained, *args, **kwargs)

    def _attach(self, optimizer: object, scheduler: object) -> bool:
        """Attach to a pending optimizer. Return whether it was pending."""
        global _last
        chunks = getattr(optimizer, _CHUNKS, None)
        if chunks is None:
            return False
        if not isinstance(getattr(optimizer, "mols", None), MegatronMols):
            mols = attach(
                chunks, optimizer, scheduler, self.config, samples_per_step=self.samples_per_step, force=self.force
            )
            # A weak reference: the optimizer holds the handle, and we must not keep the optimizer alive.
            _last = weakref.ref(mols) if isinstance(mols, MegatronMols) else (lambda: mols)
        delattr(optimizer, _CHUNKS)  # only now: a retry raises the error of attach() again
        return True

    def _ask_for_samples(
        self, stock: Method, sharded_state_dict: object, checkpoint_dir: object, *args: Any, **kwargs: Any
    ) -> object:
        """On a load into our optimizer's state dict, request the accumulators too where the checkpoint has them."""
        mols = _last()
        if isinstance(mols, MegatronMols) and isinstance(sharded_state_dict, dict):
            mols.checkpoints.ask_in(sharded_state_dict, checkpoint_dir)
        return stock(sharded_state_dict, checkpoint_dir, *args, **kwargs)


_active: _Applied | None = None
_ours: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers that have or had MoLS
_last: Callable[[], Handle | None] = lambda: None  # noqa: E731


def apply(
    config: Mapping[str, object] | MolsConfig, *, samples_per_step: int | None = None, force: bool = False
) -> None:
    """Patch megatron.core to attach MoLS to each optimizer built from now on. Call it first in a training script.

    Attaches when the OptimizerParamScheduler is built. Without a scheduler, attaches when a checkpoint is loaded or at
    the first step. `current()` returns the handle, `undo()` removes the patches.

    Args:
        config: a "mols" section (dict) or a `MolsConfig`.
        samples_per_step: increment passed to `scheduler.step()`. None: from Megatron's microbatch calculator.
        force: as in `attach`.

    Raises:
        MolsConfigError: a wrong section.
        MolsUnsupportedError: megatron-core is missing or outside the tested range.
        MolsError: called twice, or after an optimizer was built (use `attach` for it).
    """
    global _active, _last
    section = MolsConfig.parse(config)
    check_version(force)
    check_modules(ATTACHED)
    check_modules(APPLIED)
    if _active is not None:
        raise MolsError("megatron_patches.apply() was called already; call megatron_patches.undo() first")
    if _optimizer_exists():
        raise MolsError(
            "megatron_patches.apply() was called too late: a Megatron optimizer exists already. Call it before "
            "get_megatron_optimizer (before pretrain()), or call megatron_patches.attach(model, optimizer, ...)"
        )
    applied = _Applied(section, samples_per_step, force)
    _last = lambda: None  # noqa: E731
    applied.install()
    _active = applied


def undo() -> None:
    """Restore megatron.core. Attached optimizers stay attached: see `current().detach()`.

    Raises `MolsError` without a call of `apply`.
    """
    global _active
    if _active is None:
        raise MolsError("megatron_patches.undo(): nothing to undo, apply() was not called")
    _active.patches.close()
    _active = None


def current() -> Handle:
    """Return the last handle that `apply` attached.

    Raises:
        MolsConfigError: `apply` has attached nothing, or the optimizer was garbage-collected.
    """
    mols = _last()
    if mols is None:
        raise MolsConfigError(
            "megatron_patches.current(): no optimizer has been attached; call apply() first, then build the optimizer "
            "and its OptimizerParamScheduler"
        )
    return mols


def _optimizer_exists() -> bool:
    chained, _ = optimizer_classes()
    # Ignore optimizers without references, and those that had MoLS: the model config outlives them and holds
    # `optimizer.scale_loss` (Megatron-LM's training.py), so optimizers of an earlier run would seem to exist.
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), chained)]
    return any(not hasattr(optimizer, _CHUNKS) and optimizer not in _ours for optimizer in found)
