"""The two ways in: `attach` for an optimizer that exists, `apply` for a training script that builds its own."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from megatron_patches.collective_checks import same_everywhere, together
from megatron_patches.compat import APPLIED, ATTACHED, check_modules, check_version, optimizer_classes
from megatron_patches.engine import MegatronMols
from megatron_patches.monkeypatch import Patches
from megatron_patches.off import MegatronOff
from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
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
    """Put MoLS on a Megatron optimizer. Collective: every rank calls it at the same point.

    Only the instances handed over are touched. Call it after the optimizer is built and before a checkpoint is loaded.

    Args:
        model_chunks: the chunks of this rank that the optimizer was built from (a list, or the one module).
        optimizer: what `megatron.core.optimizer.get_megatron_optimizer` returned.
        scheduler: Megatron's OptimizerParamScheduler, which tells the number of steps and of warm-up steps; or None.
        config: a "mols" section (dict) or a `MolsConfig`.
        samples_per_step: what the loop passes to `scheduler.step()`, see `megatron_patches.schedule.scheduler_hints`.
        force: attach to a megatron-core outside the tested range.

    Returns:
        The object that is also `optimizer.mols`; its `detach()` makes the optimizer stock again.

    Raises:
        MolsConfigError: the section, a rule, a group name or a model config is wrong, or training is past the start.
        MolsUnsupportedError: the version, the optimizer or a setting of it is not supported; named, with the way out.
        MolsError: the ranks together do not hold each element of the model once, or MoLS is attached already.
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
    if not hasattr(optimizer, "chained_optimizers"):  # no ChainedOptimizer: there is nothing to attach to either
        return Handle()
    optimizer.mols = MegatronOff(optimizer)
    _ours.add(optimizer)
    return optimizer.mols  # type: ignore[no-any-return]


_CHUNKS = "_mols_chunks"
"""Attribute of an optimizer that waits to be attached: the model chunks that it was built from."""


Method = Callable[..., Any]
"""A function or method of Megatron's, or what takes its place."""


class _Applied:
    """What `apply` has replaced in megatron.core."""

    def __init__(self, config: MolsConfig, samples_per_step: int | None, force: bool) -> None:
        self.config, self.samples_per_step, self.force = config, samples_per_step, force
        self.patches = Patches()
        self.chunks: list[nn.Module] = []
        self.open = False  # whether `chunks` are those of an optimizer that is being built

    def install(self) -> None:
        from megatron.core import dist_checkpointing, optimizer

        chained, scheduler = optimizer_classes()
        self._replace(optimizer, "_get_param_groups", self._note_chunks)
        self._replace(chained, "__init__", self._note_optimizer)
        self._replace(scheduler, "__init__", self._note_scheduler)
        for name in ("step", "sharded_state_dict", "load_state_dict"):
            self._replace(chained, name, functools.partial(self._attach_late, name))
        self._replace(dist_checkpointing, "load", self._ask_for_samples)

    def _replace(self, owner: ModuleType | type, name: str, make: Callable[[Method], Method]) -> None:
        stock = getattr(owner, name)
        self.patches.set(owner, name, functools.wraps(stock)(make(stock)))

    # ------------------------------------------------------------------ the replacements

    def _note_chunks(self, stock: Method) -> Method:
        def get_param_groups(model_chunks: Sequence[nn.Module], *args: Any, **kwargs: Any) -> object:
            if not self.open:
                self.chunks, self.open = [], True
            known = {id(chunk) for chunk in self.chunks}
            self.chunks += [chunk for chunk in model_chunks if id(chunk) not in known]
            return stock(model_chunks, *args, **kwargs)

        return get_param_groups

    def _note_optimizer(self, stock: Method) -> Method:
        def init(chained: object, *args: Any, **kwargs: Any) -> None:
            stock(chained, *args, **kwargs)
            self.open = False
            setattr(chained, _CHUNKS, list(self.chunks))

        return init

    def _note_scheduler(self, stock: Method) -> Method:
        def init(scheduler: object, optimizer: object, *args: Any, **kwargs: Any) -> None:
            stock(scheduler, optimizer, *args, **kwargs)
            if self.open and not hasattr(optimizer, _CHUNKS):  # no ChainedOptimizer: attach() says what is wrong
                setattr(optimizer, _CHUNKS, list(self.chunks))
            self._attach(optimizer, scheduler)

        return init

    def _attach_late(self, name: str, stock: Method) -> Method:
        """A script without Megatron's scheduler: when it loads a checkpoint, or at the first step."""

        def method(chained: object, *args: Any, **kwargs: Any) -> object:
            if self._attach(chained, None):
                return getattr(chained, name)(*args, **kwargs)
            return stock(chained, *args, **kwargs)

        return method

    def _attach(self, optimizer: object, scheduler: object) -> bool:
        """Attach to an optimizer that waits for it; whether that was so."""
        global _last
        chunks = getattr(optimizer, _CHUNKS, None)
        if chunks is None:
            return False
        if not isinstance(getattr(optimizer, "mols", None), MegatronMols):
            mols = attach(
                chunks, optimizer, scheduler, self.config, samples_per_step=self.samples_per_step, force=self.force
            )
            # Not a strong reference: the optimizer holds it, and lives no longer for our sake.
            _last = weakref.ref(mols) if isinstance(mols, MegatronMols) else (lambda: mols)
        delattr(optimizer, _CHUNKS)  # only now: an error in attach() is raised again rather than passed over
        return True

    def _ask_for_samples(self, stock: Method) -> Method:
        """A load into a state dict of our optimizer: ask for the accumulators too, if they are there."""

        def load(sharded_state_dict: object, checkpoint_dir: object, *args: Any, **kwargs: Any) -> object:
            mols = _last()
            if isinstance(mols, MegatronMols) and isinstance(sharded_state_dict, dict):
                mols.checkpoints.ask_in(sharded_state_dict, checkpoint_dir)
            return stock(sharded_state_dict, checkpoint_dir, *args, **kwargs)

        return load


_active: _Applied | None = None
_ours: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers that have or had MoLS
_last: Callable[[], Handle | None] = lambda: None  # noqa: E731


def apply(
    config: Mapping[str, object] | MolsConfig, *, samples_per_step: int | None = None, force: bool = False
) -> None:
    """Patch megatron.core so that each optimizer that is built from now on gets MoLS; for the top of a training script.

    The optimizer is attached when its OptimizerParamScheduler is built; where it has none, when a checkpoint is loaded
    into it or at its first step. `current()` gives the result, `undo()` takes the patches off.

    Args:
        config: a "mols" section (dict) or a `MolsConfig`.
        samples_per_step: what the loop passes to `scheduler.step()`; None: Megatron's microbatch calculator tells.
        force: as `attach`.

    Raises:
        MolsConfigError: the section is wrong.
        MolsUnsupportedError: megatron-core is missing or outside the tested range.
        MolsError: called twice, or after an optimizer was built (attach to that one instead).
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
            "megatron_patches.apply() comes too late: a Megatron optimizer exists already. Call it before "
            "get_megatron_optimizer (before pretrain()), or call megatron_patches.attach(model, optimizer, ...)"
        )
    applied = _Applied(section, samples_per_step, force)
    _last = lambda: None  # noqa: E731
    applied.install()
    _active = applied


def undo() -> None:
    """Restore megatron.core. What is attached stays attached: `current().detach()` takes that off.

    Raises `MolsError` where nothing was applied.
    """
    global _active
    if _active is None:
        raise MolsError("megatron_patches.undo(): nothing to undo, apply() was not called")
    _active.patches.undo()
    _active = None


def current() -> Handle:
    """What `apply` attached last.

    Raises:
        MolsConfigError: `apply` has attached nothing, or the optimizer does not exist any more.
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
    # One that nobody holds any more does not count, nor one that had MoLS: the model config, which outlives it, holds
    # `optimizer.scale_loss` (Megatron-LM's training.py), so that those of a former run would seem to be in use.
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), chained)]
    return any(not hasattr(optimizer, _CHUNKS) and optimizer not in _ours for optimizer in found)
