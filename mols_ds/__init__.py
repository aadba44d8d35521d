"""MoLS: module-wise learning-rate scaling by gradient signal-to-noise ratio (arXiv 2605.05794), for DeepSpeed ZeRO."""

from typing import TYPE_CHECKING, Any

from mols_ds.config import MolsConfig
from mols_ds.errors import MolsCheckpointError, MolsConfigError, MolsError, MolsUnsupportedError, MolsWarning
from mols_ds.groups import ElementLayout, GroupTable, group_table

if TYPE_CHECKING:
    from mols_ds.zero import attach, initialize

__version__ = "0.3.0"
__all__ = [
    "ElementLayout",
    "GroupTable",
    "MolsCheckpointError",
    "MolsConfig",
    "MolsConfigError",
    "MolsError",
    "MolsUnsupportedError",
    "MolsWarning",
    "attach",
    "group_table",
    "initialize",
]


def __getattr__(name: str) -> Any:
    """DeepSpeed is imported when it is first needed: the maths and the commands do without its start-up seconds."""
    if name in ("attach", "initialize"):
        from mols_ds import zero

        return getattr(zero, name)
    raise AttributeError(f"module 'mols_ds' has no attribute {name!r}")
