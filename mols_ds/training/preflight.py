"""Check the keys of a job's config and model file before its launcher starts any process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from mols_ds.training.shipped import shipped_root

SCRIPTS = ("train.py", "finetune.py")
"""Scripts with a DeepSpeed config."""


def is_job(script: str) -> bool:
    """Whether `script` is one of this package's own `SCRIPTS`."""
    path = Path(script)
    return path.name in SCRIPTS and path.resolve() == (shipped_root() / path.name).resolve()


def check_job(argv: Sequence[str]) -> None:
    """Check the files that a job's arguments name, if this machine has them.

    Args:
        argv: the arguments of train.py or finetune.py.

    Raises:
        MolsConfigError: a misspelt key or a wrong value; one line.
    """
    config = argument(argv, "--deepspeed_config") or argument(argv, "--config")
    if config is not None and os.path.isfile(config):
        from mols_ds.training.ds_config import check_keys, read_config

        check_keys(read_config(config), config, argument(argv, "--optimizer"))
    model = argument(argv, "--model")
    if model is not None and os.path.isfile(model):
        from mols_ds.training.models import load_model_config

        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # transformers' own messages
            load_model_config(model)


def argument(argv: Sequence[str], name: str) -> str | None:
    """Return the value of an argument, `NAME VALUE` or `NAME=VALUE`; None if it is missing."""
    for index, word in enumerate(argv):
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
