"""MoLS switched off: warn about the MoLS state of a loaded checkpoint, and save it again in later checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mols_ds.core.handle import Handle
from mols_ds.core.state_check import SINCE
from mols_ds.errors import MolsWarning


class OffHandle(Handle):
    """Handle for `"enabled": false` or a config without a "mols" section. The engine trains as a stock one.

    Attributes:
        kept: MoLS state of the loaded checkpoint, which this run saves again; None without one.
    """

    kept: dict[str, Any] | None = None

    def keep(self, saved: object, t: int) -> None:
        """Keep the checkpoint's state under "mols" after a load at step t. Warns that multipliers are off."""
        self.kept = None
        if not (isinstance(saved, Mapping) and isinstance(saved.get("state"), Mapping)):
            return
        self.kept = {SINCE: t, **saved}
        state = saved["state"]
        warnings.warn(
            f"this checkpoint was saved with MoLS (phase {state.get('phase')}, alphas "
            f"{state.get('alphas') or 'not set'}), which is off in this run: every group trains at the base rate from "
            f'step {t} on. The checkpoints of this run keep the state; "enabled": true uses it again',
            MolsWarning,
            stacklevel=3,
        )
