"""Shared by the integrations: log keys, a section with filled "auto" values, restored state."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from mols_ds.core.config import MolsConfig, SummedRate
from mols_ds.core.handle import Handle
from mols_ds.core.phases import resolve_schedule
from mols_ds.core.rank_checks import together
from mols_ds.engines.torch.engine import TorchMols
from mols_ds.engines.torch.shards import this_rank
from mols_ds.errors import MolsCheckpointError, MolsConfigError

AUTO = "auto"
SMALL = 4096  # elements: a larger tensor belongs to the model, not to a client's counters
ROWS = (("alpha", "alpha"), ("snr", "snr"), ("snr_low", "snr_low"), ("snr_high", "snr_high"))
"""Kind of a log key -> key of a group in the report."""


def log_values(handle: Handle) -> dict[str, float]:
    """Return the values to log: `mols/KIND/GROUP` -> value.

    Kinds: `multiplier` and `lr` (of the last step); after a calibration `alpha`, and `snr`, `snr_low` and `snr_high` of
    the measured groups. Empty if MoLS is off.
    """
    found: dict[str, float] = {}
    for group, multiplier in handle.multipliers.items():
        found[f"mols/multiplier/{group}"] = multiplier
    for group, lr in handle.applied_lrs.items():
        found[f"mols/lr/{group}"] = lr
    for group, row in handle.report().get("groups", {}).items():
        values = {kind: row.get(key) for kind, key in ROWS}
        found |= {f"mols/{kind}/{group}": float(value) for kind, value in values.items() if value is not None}
    return found


def resolve_section(argument: Mapping[str, Any] | None, config: Mapping[str, Any] | None, who: str) -> dict[str, Any]:
    """Return the section from the argument or the DeepSpeed config.

    Args:
        argument: a "mols" section, or None.
        config: the DeepSpeed config, or None.
        who: name of the integration, for messages.

    Raises:
        MolsConfigError: no section, or two different ones.
    """
    inside = None if config is None else config.get("mols")
    if argument is None and inside is None:
        raise MolsConfigError(f'{who}: no "mols" section; pass {who}(section), or put one into the DeepSpeed config')
    if argument is not None and inside is not None and dict(argument) != inside:
        raise MolsConfigError(
            f'{who}: the "mols" sections of the argument and of the DeepSpeed config differ; drop one'
        )
    section = inside if argument is None else argument
    if not isinstance(section, Mapping):
        raise MolsConfigError(f'"mols": must be an object (a JSON section), got {type(section).__name__}')
    return dict(section)


def fill_section(section: Mapping[str, Any], total_steps: int | None, warmup_steps: int | None = None) -> MolsConfig:
    """Fill in the number of steps, and what the linear warm-up gives (`ramp_end`, a `start` by the summed rate), and
    validate the section."""
    filled = dict(section)
    if filled.get("total_steps") in (None, AUTO):
        filled["total_steps"] = total_steps
    if filled.get("ramp_end") == AUTO and warmup_steps is not None:
        filled["ramp_end"] = warmup_steps
    config = MolsConfig.parse(filled)
    if isinstance(config.start, SummedRate) and warmup_steps is not None:
        schedule = resolve_schedule(config, total_steps, warmup_steps)
        config = config.model_copy(update={"start": schedule.start, "ramp_end": schedule.ramp_end})
    return config


def save_state(mols: Handle, folder: str | Path) -> None:
    """Save this rank's state of a handle of plain torch into a checkpoint folder of the client. No communication."""
    path = _state_file(folder, this_rank())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(mols.state_dict(), path)


def load_state(mols: Handle, folder: str | Path) -> None:
    """Continue from a folder of `save_state`, after the client has loaded the optimizers. Collective.

    A rank without a file of its own (the checkpoint is of fewer ranks) reads rank 0's. Without any file, the run
    continues as from a checkpoint without MoLS, with a warning.

    Raises:
        MolsCheckpointError: on every rank, if only some ranks find a file, or one cannot read its own.
    """
    path = next((p for p in (_state_file(folder, rank) for rank in (this_rank(), 0)) if p.exists()), None)
    found = together(lambda: path is not None)
    if any(found) and not all(found):
        raise MolsCheckpointError(
            f"{_state_file(folder, 0)}: rank {found.index(False)} does not find this file, rank {found.index(True)} "
            "does: all ranks need the folder of the checkpoint"
        )
    if path is not None:
        state: dict[str, Any] = {}
        together(functools.partial(_read_state, path, state))
        mols.load_state_dict(state)
    elif isinstance(mols, TorchMols):
        mols.resume_stock()


def _read_state(path: Path, into: dict[str, Any]) -> None:
    try:
        into.update(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = str(error).partition("\n")[0]
        raise MolsCheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason}): resume from another checkpoint; to calibrate "
            "again delete this file on all ranks"
        ) from error


def _state_file(folder: str | Path, rank: int) -> Path:
    return Path(folder, f"mols_{rank}.pt")


@contextlib.contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Restore the RNG state of torch, the accelerator, numpy and Python after reading and computing a batch."""
    accelerator = get_accelerator()
    saved = torch.get_rng_state(), accelerator.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        accelerator.set_rng_state(saved[1])
        np.random.set_state(saved[2])
        random.setstate(saved[3])


@contextlib.contextmanager
def preserved_attributes(owner: object) -> Iterator[None]:
    """Undo assignments to attributes of `owner`, and additions to its private containers of numbers (`_metrics` of
    TRL's trainers), which are replaced by copies within the context."""
    saved = dict(vars(owner))
    for name, value in saved.items():
        if name.startswith("_") and isinstance(value, (dict, list, set)) and _is_plain(value):
            setattr(owner, name, copy.deepcopy(value))
    try:
        yield
    finally:
        for name in set(vars(owner)) - set(saved):
            delattr(owner, name)
        vars(owner).update(saved)


@contextlib.contextmanager
def preserved_loader(loader: object) -> Iterator[None]:
    """Iterators that the code inside makes leave no trace in a loader: its attributes, those of its samplers, and the
    state of their generators are put back."""
    holders: dict[int, object] = {}
    found = [loader]
    while found:
        holder = found.pop()
        if hasattr(holder, "__dict__") and id(holder) not in holders:
            holders[id(holder)] = holder
            found += [getattr(holder, name, None) for name in ("sampler", "batch_sampler", "base_dataloader")]
    states = [state for holder in holders.values() for value in vars(holder).values() for state in _random_state(value)]
    try:
        with contextlib.ExitStack() as stack:
            for holder in holders.values():
                stack.enter_context(preserved_attributes(holder))
            yield
    finally:
        for put_back, state in states:
            put_back(state)


def _random_state(value: object) -> list[tuple[Callable[[Any], object], Any]]:
    """(function that puts it back, state) of a generator; nothing of anything else."""
    if isinstance(value, torch.Generator):
        return [(value.set_state, value.get_state())]
    if isinstance(value, random.Random):
        return [(value.setstate, value.getstate())]
    if isinstance(value, np.random.RandomState):
        return [(value.set_state, value.get_state())]
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return [(functools.partial(setattr, bits, "state"), bits.state)]
    return []


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.numel() <= SMALL
    return value is None or isinstance(value, (int, float, str))
