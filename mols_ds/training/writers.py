"""TensorBoard and Weights & Biases for train_megatron.py. train.py and finetune.py have DeepSpeed's monitor."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mols_ds.errors import MolsConfigError
from mols_ds.training.megatron_settings import RunSettings


def check_writers(run: RunSettings) -> None:
    """Raise MolsConfigError if a package is missing that the settings need."""
    for setting, package in ((run.tensorboard_dir, "tensorboard"), (run.wandb_project, "wandb")):
        if setting is not None and importlib.util.find_spec(package) is None:
            raise MolsConfigError(f"run: {setting!r} needs {package}, which is not installed: pip install {package}")


class Writers:
    """Write numbers to the places that the settings name (Megatron-LM's arguments of the same names). On one rank.

    Args:
        run: `tensorboard_dir`, `wandb_project`, `wandb_exp_name`.
        out: the run's folder; W&B writes its local files there.
        config: settings that W&B shows.
    """

    def __init__(self, run: RunSettings, out: Path, config: Mapping[str, Any]) -> None:
        self._board: Any = None
        self._wandb: Any = None
        if run.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(run.tensorboard_dir)
        if run.wandb_project is not None:
            self._wandb = importlib.import_module("wandb").init(
                project=run.wandb_project, name=run.wandb_exp_name, dir=str(out), config=dict(config)
            )

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of an update."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and close."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
