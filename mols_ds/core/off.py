"""MoLS that is switched off: what a loaded checkpoint holds of it is said, and kept for the checkpoints of this run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mols_ds.core.handle import Handle
from mols_ds.core.state_check import SINCE
from mols_ds.errors import MolsWarning


class OffHandle(Handle):
    """`"enabled": false`, or no "mols" section. The engine trains as a stock one.

    Attributes:
        kept: the state of MoLS in the checkpoint that was loaded, which goes into those that this run saves; None where
            there is none.
    """

    kept: dict[str, Any] | None = None

    def keep(self, saved: object, t: int) -> None:
        """After a load at step t: keep what the checkpoint has under "mols", and say that multipliers are dropped."""
        self.kept = None
        if not (isinstance(saved, Mapping) and isinstance(saved.get("state"), Mapping)):
            return
        self.kept = {SINCE: t, **saved}
        state = saved["state"]
        warnings.warn(
            f"this checkpoint was saved with MoLS (phase {state.get('phase')}, alphas "
            f"{state.get('alphas') or 'not set'}), which is off in this run: every group trains at the base rate from "
            f'step {t} on. The state is kept in the checkpoints of this run; "enabled": true takes it up again',
            MolsWarning,
            stacklevel=3,
        )
