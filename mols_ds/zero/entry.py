"""The two ways in: `initialize` in the place of `deepspeed.initialize`, and `attach` for an engine that exists."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

from mols_ds.calibration import Phase
from mols_ds.config import MolsConfig
from mols_ds.errors import MolsConfigError, MolsError
from mols_ds.zero.engine import EngineMols


class DisabledMols:
    """`engine.mols` where MoLS is off: DeepSpeed is exactly stock."""

    phase: Phase = "disabled"
    alphas: dict[str, float] = {}  # noqa: RUF012 - read-only by contract
    multipliers: dict[str, float] = {}  # noqa: RUF012
    applied_lrs: dict[str, float] = {}  # noqa: RUF012
    samples = 0
    accumulator_bytes = 0

    def report(self) -> dict[str, Any]:
        """Empty: nothing was measured."""
        return {}

    def detach(self) -> None:
        """Nothing to undo."""


def attach(engine: Any, config: Mapping[str, Any] | MolsConfig) -> EngineMols | DisabledMols:
    """Put MoLS on a DeepSpeed engine that exists already. Collective: every rank calls it at the same point.

    Args:
        engine: what `deepspeed.initialize` returned; ZeRO stage 0-3, before or after any number of steps.
        config: a "mols" section (dict) or a `MolsConfig`.

    Returns:
        The object that is also `engine.mols`; its `detach()` makes the engine stock again.

    Raises:
        MolsConfigError: the section, a rule or a group name is wrong.
        MolsUnsupportedError: the engine, its optimizer or a setting of it cannot be supported; named, with the way out.
    """
    section = MolsConfig.parse(config)
    if isinstance(getattr(engine, "mols", None), EngineMols):
        raise MolsError("this engine has MoLS already; call engine.mols.detach() first")
    engine.mols = EngineMols(engine, section) if section.enabled else DisabledMols()
    return engine.mols  # type: ignore[no-any-return]


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` with the "mols" section of the DeepSpeed config.

    Same arguments and same four results (deepspeed/__init__.py). Without a "mols" section, or with
    `"enabled": false`, the result is bit for bit that of `deepspeed.initialize`.

    Raises:
        MolsConfigError, MolsUnsupportedError: as `attach`; a wrong section is refused before the engine is built.
    """
    section = _find_section(inspect.signature(deepspeed.initialize).bind(*args, **kwargs).arguments)
    results: tuple[Any, Any, Any, Any] = deepspeed.initialize(*args, **kwargs)
    if section is None or not section.enabled:
        results[0].mols = DisabledMols()
    else:
        attach(results[0], section)
    return results


def _find_section(arguments: Mapping[str, Any]) -> MolsConfig | None:
    """The validated "mols" section of the config that these arguments name, read by DeepSpeed's own loader."""
    config = arguments.get("config") or arguments.get("config_params")
    if config is None:
        launched = arguments.get("args")
        config = getattr(launched, "deepspeed_config", None) or getattr(launched, "deepscale_config", None)
    if config is None:
        return None
    if not isinstance(config, Mapping):
        if not Path(config).is_file() and str(config).endswith(".json"):
            raise MolsConfigError(f"DeepSpeed config {config}: no such file")
        config = load_ds_config(config)
    section = config.get("mols")
    return None if section is None else MolsConfig.parse(section)
