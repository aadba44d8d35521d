"""Save each rank's RNG state beside a checkpoint, so that dropout continues. DeepSpeed does not save it."""

from __future__ import annotations

from pathlib import Path

import torch

from mols_ds.errors import MolsCheckpointError


def _path(folder: Path, rank: int, world: int) -> Path:
    """Path with the world size: another number of ranks finds no file and starts with new generators."""
    return folder / f"random_{rank}_of_{world}.pt"


def save_random(folder: Path, rank: int, world: int) -> None:
    """Write this rank's CPU and accelerator RNG state to `folder`."""
    from deepspeed.accelerator import get_accelerator

    state = {"torch": torch.get_rng_state(), "accelerator": get_accelerator().get_rng_state()}
    torch.save(state, _path(folder, rank, world))


def load_random(folder: Path, rank: int, world: int) -> None:
    """Load the RNG state of `save_random`. Does nothing if there is none for this number of ranks.

    Raises:
        MolsCheckpointError: the file is not one of `save_random`.
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
