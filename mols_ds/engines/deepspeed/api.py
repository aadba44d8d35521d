"""Entry points: `initialize` instead of `deepspeed.initialize`, and `attach` for an existing engine."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mols_ds.core.config import MolsConfig
from mols_ds.core.files import read_text
from mols_ds.core.handle import Handle
from mols_ds.core.log import say
from mols_ds.core.plain_data import check_plain
from mols_ds.engines.deepspeed.bind_optimizer import bind_optimizer
from mols_ds.engines.deepspeed.compat import INITIALIZE, Config, Engine, read_config
from mols_ds.engines.deepspeed.engine import EngineMols, Loop
from mols_ds.engines.deepspeed.off import EngineOff
from mols_ds.errors import MolsConfigError, MolsError, MolsUnsupportedError
from mols_ds.optim.build import Request, build, split_config

Initialized = tuple[Any, Any, Any, Any]
"""Result of `deepspeed.initialize`: engine, optimizer, data loader, scheduler."""
Initialize = Callable[..., Initialized]
STOCK: Initialize = deepspeed.initialize
"""DeepSpeed's function at the first use of `mols_ds.initialize`. `deepspeed.initialize` may be ours later."""
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

    Same arguments and results as DeepSpeed's function (deepspeed/__init__.py). `mols_ds.optim` builds an "optimizer"
    whose "type" DeepSpeed does not know, or with `"source": "library"`. With neither such a section nor a "mols"
    section (or with `"enabled": false`), the result is bit for bit that of `deepspeed.initialize`.

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
    config = _find_config(arguments, strict=not patched)
    found = given if given is not None or config is None else config.get("mols")
    if patched and found is None:
        return below(*args, **kwargs)
    section = None if found is None else MolsConfig.parse(found)
    if patched and _trains_nothing(arguments, config):
        say('MoLS: the "mols" section is left out for an engine without an optimizer, which trains nothing')
        return below(*args, **kwargs)
    request = None if config is None else split_config(config)
    results = below(*args, **kwargs) if request is None else _initialize_ours(below, arguments, request)
    attach_to(results[0], section or MolsConfig(enabled=False), loop)
    return results


def _arguments(below: Initialize, args: tuple[Any, ...], kwargs: Config) -> Config:
    """Return the arguments by name; those of DeepSpeed's function for a replacement with `*args, **kwargs`."""
    signature = inspect.signature(below)
    if "config" not in signature.parameters:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in INITIALIZE])
    return signature.bind(*args, **kwargs).arguments


def _trains_nothing(arguments: Config, config: Config | None) -> bool:
    return arguments.get("optimizer") is None and "optimizer" not in (config or {})


def _find_config(arguments: Config, strict: bool) -> Config | None:
    """Read the config of these arguments with DeepSpeed's own loader; None if there is none.

    Raises:
        MolsConfigError: with `strict`, for a file or text that cannot be read. Without, DeepSpeed raises later.
    """
    config = arguments.get("config") or arguments.get("config_params")
    if config is None:
        launched = arguments.get("args")
        config = getattr(launched, "deepspeed_config", None) or getattr(launched, "deepscale_config", None)
    if config is None:
        return None
    if isinstance(config, Mapping):
        check_plain(config, "DeepSpeed config")
        return config
    try:
        return _read(config)
    except MolsConfigError:
        if strict:
            raise
        return None


def _read(config: Any) -> Config:
    """Read a config file or a base64 text as DeepSpeed does. Raises MolsConfigError."""
    where = f"DeepSpeed config {str(config)[:200]}"
    try:
        there = Path(config).exists()
    except (OSError, TypeError, ValueError):  # a text longer than any file name
        there = False
    if there and not read_text(config, where).strip():
        raise MolsConfigError(f"{where}: the file is empty")
    if not there and str(config).endswith(".json"):
        raise MolsConfigError(f"{where}: no such file")
    try:
        content = read_config(config)
    except (ValueError, TypeError, AttributeError, RecursionError, AssertionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise MolsConfigError(f"{where}: cannot be read: {what}") from error
    if not isinstance(content, Mapping):
        raise MolsConfigError(f"{where}: a JSON object is needed, not {type(content).__name__}")
    check_plain(content, where)
    return content


def _initialize_ours(below: Initialize, arguments: Config, request: Request) -> Initialized:
    """Run `deepspeed.initialize` with the optimizer of `request` as the client's, and bind it to its shards."""
    if arguments.get("optimizer") is not None:
        raise MolsConfigError(
            f'two optimizers: the config\'s "optimizer" ({request.entry.name}) and the argument `optimizer`; drop one'
        )
    if request.entry.reads == "tensors" and arguments.get("mpu") is not None:
        raise MolsUnsupportedError(
            f"optimizer {request.entry.name} works on whole tensors, but with the argument `mpu` ranks have parts "
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
