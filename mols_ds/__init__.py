"""MoLS: module-wise learning-rate scaling by gradient signal-to-noise ratio (arXiv 2605.05794), for DeepSpeed ZeRO."""

import importlib
from typing import TYPE_CHECKING, Any

from mols_ds.errors import (
    MolsCheckpointError,
    MolsConfigError,
    MolsError,
    MolsTrainingError,
    MolsUnsupportedError,
    MolsWarning,
)

if TYPE_CHECKING:
    from mols_ds.core.config import MolsConfig
    from mols_ds.core.groups import ElementLayout, GroupTable, group_table
    from mols_ds.engines.api import attach
    from mols_ds.engines.deepspeed.api import initialize
    from mols_ds.engines.deepspeed.patching import patch, unpatch

__version__ = "0.4.0"
__all__ = [
    "ElementLayout",
    "GroupTable",
    "MolsCheckpointError",
    "MolsConfig",
    "MolsConfigError",
    "MolsError",
    "MolsTrainingError",
    "MolsUnsupportedError",
    "MolsWarning",
    "attach",
    "group_table",
    "initialize",
    "patch",
    "unpatch",
]

_PLACES = {
    "MolsConfig": "core.config",
    **dict.fromkeys(("ElementLayout", "GroupTable", "group_table"), "core.groups"),
    "attach": "engines.api",
    "initialize": "engines.deepspeed.api",
    **dict.fromkeys(("patch", "unpatch"), "engines.deepspeed.patching"),
}


def __getattr__(name: str) -> Any:
    """Import names that need torch, pydantic or DeepSpeed at first use: commands start without them, and `mols-ds
    doctor` can name a broken one."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"mols_ds.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'mols_ds' has no attribute {name!r}")
