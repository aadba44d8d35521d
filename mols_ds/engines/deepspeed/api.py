"""Entry points: `initialize` instead of `deepspeed.initialize`, and `attach` for an existing engine."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import deepspeed
import torch

from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
from mols_ds.core.log import say
from mols_ds.engines.deepspeed.auto_values import check_no_auto
from mols_ds.engines.deepspeed.bind_optimizer import bind_optimizer
from mols_ds.engines.deepspeed.compat import INITIALIZE, Config, Engine
from mols_ds.engines.deepspeed.config_reader import misspelt_section, read_config
from mols_ds.engines.deepspeed.engine import EngineMols, Loop
from mols_ds.engines.deepspeed.off import EngineOff
from mols_ds.errors import MolsConfigError, MolsError, MolsUnsupportedError, MolsWarning
from mols_ds.optim.build import Request, build, split_config

Initialized = tuple[Any, Any, Any, Any]
"""Result of `deepspeed.initialize`: engine, optimizer, data loader, scheduler."""
Initialize = Callable[..., Initialized]
STOCK: Initialize = deepspeed.initialize
"""DeepSpeed's function at the first use of `mols_ds.initialize`. `deepspeed.initialize` may be ours later."""
sections_used = 0
"""How many engines of this process got a "mols" section."""
_initializing: ContextVar[bool] = ContextVar("mols_initialize_under_way", default=False)
"""Whether one of our `deepspeed.initialize` functions runs now: a nested one then only calls the next."""


def attach(engine: Engine, config: Mapping[str, object] | MolsConfig) -> Handle:
    """Attach MoLS to an existing DeepSpeed engine. Collective: every rank calls it at the same point.

    Args:
        engine: result of `deepspeed.initialize`; ZeRO stage 0-3, before or after any number of steps.
        config: a "mols" section (dict) or a `MolsConfig`.

    Returns:
        The handle, also at `engine.mols`. Its `detach()` makes the engine stock again.

    Raises:
        MolsConfigError: a wrong section, rule or group name.
        MolsUnsupportedError: an unsupported engine, optimizer or setting; the message names it and what to do.
    """
    return attach_to(engine, MolsConfig.parse(config))


def attach_to(engine: Engine, section: MolsConfig, loop: Loop = "own") -> Handle:
    """`attach` for integrations, which know who calls the engine's step."""
    check_is_engine(engine)
    if isinstance(getattr(engine, "mols", None), EngineMols):
        raise MolsError("this engine has MoLS already; call engine.mols.detach() first")
    if isinstance(getattr(engine, "mols", None), EngineOff):
        engine.mols.detach()
    bind_optimizer(engine, section.rules)
    engine.mols = EngineMols(engine, section, loop) if section.enabled else EngineOff(engine)
    global sections_used
    sections_used += section.enabled
    return engine.mols  # type: ignore[no-any-return]


def check_is_engine(engine: object) -> None:
    """Refuse objects that are often taken for the engine: a model, its DDP wrapper, a Trainer, an optimizer."""
    if isinstance(engine, deepspeed.DeepSpeedEngine):
        return
    raise MolsConfigError(
        f"mols_ds.attach: {type(engine).__name__} is not a DeepSpeed engine; pass what deepspeed.initialize returned "
        "first (Trainer: trainer.model_wrapped, Accelerate: the model that prepare() returned, Lightning: "
        "trainer.strategy.model)"
    )


def initialize(*args: Any, **kwargs: Any) -> Initialized:
    """Run `deepspeed.initialize` with the "mols" section of the DeepSpeed config, and with optimizers by name.

    `mols_ds.optim` builds an "optimizer" whose "type" DeepSpeed does not know, or with `"source": "library"`. With
    neither such an optimizer nor a "mols" section (or with `"enabled": false`), the result is bit for bit that of
    `deepspeed.initialize`.

    Args:
        *args: those of `deepspeed.initialize` (deepspeed/__init__.py).
        **kwargs: likewise.

    Returns:
        Its four results: engine, optimizer, data loader, scheduler. `engine.mols` is the handle.

    Raises:
        MolsConfigError, MolsUnsupportedError: as `attach` and `mols_ds.optim.build.split_config`. A wrong section is an
            error before the engine is built.
    """
    return initialize_over(STOCK, args, kwargs)


def initialize_over(
    below: Initialize,
    args: tuple[Any, ...],
    kwargs: Config,
    *,
    section: Mapping[str, object] | MolsConfig | None = None,
    patched: bool = False,
    loop: Loop = "own",
) -> Initialized:
    """Run `initialize` over any function with the arguments of `deepspeed.initialize`.

    Args:
        below: builds the engine: DeepSpeed's function, or another replacement of it.
        args, kwargs: of the caller.
        section: a "mols" section that overrides the config's.
        patched: the caller used `deepspeed.initialize`. Then an engine without a section, or without training (a
            reference model), is the unchanged result of `below`.
        loop: caller of the engine's step.
    """
    if _initializing.get():
        return below(*args, **kwargs)
    token = _initializing.set(True)
    try:
        return _initialize(below, args, kwargs, section, patched, loop)
    finally:
        _initializing.reset(token)


def _initialize(
    below: Initialize,
    args: tuple[Any, ...],
    kwargs: Config,
    given: Mapping[str, object] | MolsConfig | None,
    patched: bool,
    loop: Loop,
) -> Initialized:
    arguments = _arguments(below, args, kwargs)
    try:
        config = _find_config(arguments)
    except MolsConfigError as error:
        if not patched or given is not None:
            raise
        results = below(*args, **kwargs)  # DeepSpeed refuses what cannot be read, in its own words
        _warn(f"MoLS is off: DeepSpeed takes this config, and MoLS cannot read it: {error}")
        return results
    found = given if given is not None or config is None else config.get("mols")
    if found is None and config is not None and (key := misspelt_section(config)):
        _warn(f'MoLS is off: the DeepSpeed config has no section "mols", but a key {key!r}; did you mean "mols"?')
    if patched and found is None:
        return below(*args, **kwargs)
    section = None if found is None else MolsConfig.parse(found)
    if patched and _trains_nothing(arguments, config):
        say('MoLS: the "mols" section is left out for an engine without an optimizer, which trains nothing')
        return below(*args, **kwargs)
    request = None if config is None else split_config(config)
    if config is not None and (section is not None or request is not None):
        read = config if request is None else request.config
        replaced = {"optimizer": "optimizer", "scheduler": "lr_scheduler"}  # section -> the argument in its place
        unread = [section for section, name in replaced.items() if arguments.get(name) is not None]
        check_no_auto({key: value for key, value in read.items() if key not in unread})
    results = below(*args, **kwargs) if request is None else _initialize_ours(below, arguments, request)
    attach_to(results[0], section or MolsConfig(enabled=False), loop)
    return results


def _warn(text: str) -> None:
    warnings.warn(text, MolsWarning, stacklevel=4)


def is_left_out(arguments: Config) -> bool:
    """Return whether stock `deepspeed.initialize` with these arguments would ignore a "mols" section that is on."""
    try:
        config = None if _initializing.get() else _find_config(arguments)
    except MolsConfigError:  # DeepSpeed refuses what cannot be read
        return False
    section = None if config is None else config.get("mols")
    return section is not None and not _trains_nothing(arguments, config) and MolsConfig.parse(section).enabled


def _arguments(below: Initialize, args: tuple[Any, ...], kwargs: Config) -> Config:
    """Return the arguments by name; those of DeepSpeed's function for a replacement with `*args, **kwargs`."""
    signature = inspect.signature(below)
    if "config" not in signature.parameters:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in INITIALIZE])
    return signature.bind(*args, **kwargs).arguments


def _trains_nothing(arguments: Config, config: Config | None) -> bool:
    return arguments.get("optimizer") is None and "optimizer" not in (config or {})


def _find_config(arguments: Config) -> Config | None:
    """Return the config of these arguments; None if there is none. Raises MolsConfigError as `read_config`."""
    config = arguments.get("config") or arguments.get("config_params")
    if config is None:
        launched = arguments.get("args")
        config = getattr(launched, "deepspeed_config", None) or getattr(launched, "deepscale_config", None)
    return None if config is None else read_config(config)


def _initialize_ours(below: Initialize, arguments: Config, request: Request) -> Initialized:
    """Run `deepspeed.initialize` with the optimizer of `request` as the client's, and bind it to its shards."""
    if arguments.get("optimizer") is not None:
        raise MolsConfigError(
            f'two optimizers: the config\'s "optimizer" ({request.entry.name}) and the argument `optimizer`; drop one'
        )
    if request.entry.reads == "tensors" and arguments.get("mpu") is not None:
        raise MolsUnsupportedError(
            f"optimizer {request.entry.name} needs whole tensors, but with the argument `mpu` ranks have parts "
            "of them: use an elementwise optimizer"
        )
    optimizer = build(request, arguments["model"], arguments.get("model_parameters"))
    launched = copy.copy(arguments.get("args"))  # DeepSpeed refuses a config in two places
    for name in ("deepspeed_config", "deepscale_config"):
        if getattr(launched, name, None) is not None:
            setattr(launched, name, None)
    stock = {k: v for k, v in arguments.items() if k not in ("config_params", "model_parameters")}
    options = [set(group) for group in optimizer.param_groups]
    results = below(**{**stock, "args": launched, "optimizer": optimizer, "config": request.config})
    _forget_empty_step(results[0], optimizer, options)
    return results


def _forget_empty_step(engine: Engine, optimizer: torch.optim.Optimizer, options: list[set[str]]) -> None:
    """Undo the step with zero gradients in the constructor of DeepSpeed's 16-bit wrapper of stage 0.

    (runtime/fp16/unfused_optimizer.py, initialize_optimizer_states.) It would decay the weights and count as the first
    gradient, from which some optimizers compute a basis (GaLore, SOAP) or a rate per tensor (SGD-SaI).
    options: keys of each parameter group before.
    """
    outer = engine.optimizer
    if type(outer).__name__ != "FP16_UnfusedOptimizer":
        return
    with torch.no_grad():
        for low, high in zip(outer.fp16_groups, outer.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                master.copy_(parameter)
    optimizer.state.clear()
    for group, known in zip(optimizer.param_groups, options, strict=True):
        for key in set(group) - known - {"initial_lr"}:
            del group[key]
