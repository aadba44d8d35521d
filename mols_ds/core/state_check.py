"""Check whether the MoLS state of a checkpoint fits this run. Changes nothing; independent of the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mols_ds.core.schema import schema_problem
from mols_ds.core.validation import validation_message
from mols_ds.errors import MolsCheckpointError

SINCE = "off_since"
"""Key of a state that passed through a run with MoLS off: the step at which that run loaded it."""

STATE_VERSION = 1
Count = Annotated[int, Field(ge=0)]
Alphas = dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]


class _State(BaseModel):
    """Valid values of `Calibration.state_dict`."""

    model_config = ConfigDict(strict=True)

    phase: Literal["waiting", "calibrating", "ramping", "fixed"]
    samples: Count
    attempts: Count
    skipped: Count
    begun_at: Count | None
    ended_at: Count | None
    ramp_until: Count
    old: Alphas
    alphas: Alphas


def check_saved(
    saved: object, elements: Mapping[str, int], state_keys: Iterable[str], advise: Callable[[Mapping[str, object]], str]
) -> None:
    """Check that `saved` is a `Controller.state_dict` with these module groups.

    Args:
        saved: value of the key "mols" of a checkpoint (DeepSpeed: of its client_state); may be anything.
        elements: module group -> element count of this run's model.
        state_keys: keys of `Calibration.state_dict`.
        advise: saved module groups -> what to do where they differ from this run's.

    Raises:
        MolsCheckpointError: it is not.
    """
    if not isinstance(saved, Mapping) or "version" not in saved:
        raise MolsCheckpointError(
            'the value of "mols" in this checkpoint was not written by MoLS; '
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
            f"{advise(saved['groups'])}"
        )
    _check_values(saved["state"], saved["report"], elements)


def _check_values(state: Mapping[str, object], report: Mapping[str, object], elements: Mapping[str, int]) -> None:
    """Raise `MolsCheckpointError` for values that `Calibration` never has, or for a report with a wrong schema."""
    try:
        values = _State.model_validate(dict(state))
    except ValidationError as error:
        raise _damaged(validation_message(error, _State)) from None
    over = values.phase in ("ramping", "fixed")
    if over and (values.ended_at is None or not values.alphas):
        raise _damaged(f'phase "{values.phase}" without alphas, or without the step of its calibration')
    if values.phase == "calibrating" and values.begun_at is None:
        raise _damaged("a calibration without a first step")
    try:
        problem = schema_problem(json.loads(json.dumps(dict(report)))) if report else None
    except (TypeError, ValueError) as error:
        raise _damaged(f"its report is not plain data ({error})") from None
    if problem:
        raise _damaged(f"its report: {problem}")
    unknown = sorted((set(values.alphas) | set(values.old)) - set(elements))
    if unknown:
        raise _damaged(f"multipliers of {', '.join(unknown)}, which are no module groups of this model")


def _damaged(what: str) -> MolsCheckpointError:
    return MolsCheckpointError(f"the MoLS state of this checkpoint is damaged: {what}; load an earlier checkpoint")
