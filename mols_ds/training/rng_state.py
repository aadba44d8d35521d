"""The random state of each rank beside a checkpoint, so that dropout goes on where it was: DeepSpeed saves none."""

from __future__ import annotations

from pathlib import Path

import torch

from mols_ds.errors import MolsCheckpointError


def _path(folder: Path, rank: int, world: int) -> Path:
    """Another number of ranks finds nothing of its own: its generators start anew."""
    return folder / f"random_{rank}_of_{world}.pt"


def save_random(folder: Path, rank: int, world: int) -> None:
    """Write this rank's generators of CPU and accelerator into `folder`."""
    from deepspeed.accelerator import get_accelerator

    state = {"torch": torch.get_rng_state(), "accelerator": get_accelerator().get_rng_state()}
    torch.save(state, _path(folder, rank, world))


def load_random(folder: Path, rank: int, world: int) -> None:
    """Set them as `save_random` found them; where it wrote none for this many ranks, they stay as they are.

    Raises MolsCheckpointError for a file that is none of its.
    """
    from deepspeed.accelerator import get_accelerator

    path = _path(folder, rank, world)
    if not path.is_file():
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        torch.set_rng_state(state["torch"])
        get_accelerator().set_rng_state(state["accelerator"])
    except Exception as error:  # torch raises a dozen unrelated types for a broken file
        raise MolsCheckpointError(f"--resume: {path} cannot be read: {type(error).__name__}") from error
