"""Whether the MoLS state of a checkpoint fits this run: checks only, nothing is changed. Engine-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mols_ds.errors import MolsCheckpointError

STATE_VERSION = 1


def check_saved(saved: Any, elements: Mapping[str, int], state_keys: Mapping[str, Any]) -> None:
    """Raise `MolsCheckpointError` unless `saved` is what `Controller.state_dict` gives, for these module groups.

    Args:
        saved: what stood under the key "mols" of a checkpoint (DeepSpeed: of its client_state); may be anything.
        elements: module group -> element count of this run's model.
        state_keys: a state of `Calibration`, of which only the keys are read.
    """
    if not isinstance(saved, Mapping) or "version" not in saved:
        raise MolsCheckpointError(
            'what stands under "mols" in this checkpoint was not written by MoLS; '
            "load it without MoLS and save it again without that key"
        )
    if saved["version"] != STATE_VERSION:
        raise MolsCheckpointError(f"MoLS state of version {saved['version']}; this release reads {STATE_VERSION}")
    missing = [key for key in ("groups", "state", "report") if not isinstance(saved.get(key), Mapping)]
    missing = missing or [key for key in state_keys if key not in saved["state"]]
    if missing:
        raise MolsCheckpointError(f"the MoLS state of this checkpoint lacks {', '.join(missing)}")
    if dict(saved["groups"]) != dict(elements):
        raise MolsCheckpointError(
            f"the checkpoint's module groups {dict(saved['groups'])} are not this model's {dict(elements)}; "
            "use the model, mols.rules and mols.granularity of the run that saved it"
        )
