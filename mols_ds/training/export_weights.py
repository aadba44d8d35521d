"""Write a checkpoint of train.py as a transformers folder: configuration, safetensors and tokenizer."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from mols_ds.core.json_text import read_json
from mols_ds.engines.deepspeed import compat
from mols_ds.errors import MolsConfigError
from mols_ds.training.checkpointer import Checkpointer
from mols_ds.training.run_folder import BASE, RUN
from mols_ds.training.sources import one_line
from mols_ds.training.trainer import CHECKPOINTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_base(config: Any, tokenizer: str, out: Path) -> None:
    """Write the configuration of the model and the tokenizer of a run to OUT/`BASE`. On one rank.

    Args:
        config: the model's transformers configuration.
        tokenizer: its folder.
    """
    from transformers import AutoTokenizer

    config.save_pretrained(out / BASE)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out / BASE)


def export_run(out: Path, folder: Path, *, step: int | None = None, dtype: str | None = None) -> str:
    """Write a checkpoint of the run in `out` as a transformers folder.

    Args:
        out: the run's folder; an arm's for a comparison.
        folder: to write.
        step: of the checkpoint; None: the newest valid one.
        dtype: of the weights, a key of `DTYPES`; None: the run's, so that the logits are those of the engine.

    Returns:
        What was written, in one line.

    Raises:
        MolsConfigError: no run of train.py, no such checkpoint, one that cannot be converted, or `folder` has other
            files than those of a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if (folder.exists() and not folder.is_dir()) or RUN in names or (names and "config.json" not in names):
        raise MolsConfigError(f"export: {folder} has other files than a model's: name a new folder")
    base = next((place / BASE for place in (out, out.parent) if (place / BASE).is_dir()), None)
    if base is None:
        raise MolsConfigError(f"export: {out} {_not_exported(out)}")
    saver = Checkpointer(out / CHECKPOINTS)
    tag = saver.newest() if step is None else f"step{step}"
    if (problem := saver.problem(tag)) is not None:
        raise MolsConfigError(f"export: checkpoint {out / CHECKPOINTS / tag}: {problem}")
    target = DTYPES[dtype or _dtype_of(base.parent)]
    weights = load_weights(out / CHECKPOINTS, tag)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
        model.load_state_dict(weights, strict=not model.config.tie_word_embeddings)
        model.tie_weights()
        model.to(target).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise MolsConfigError(f"export: {tag} cannot be written to {folder}: {one_line(error)}") from error
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{folder}: {tag} of {out}, {count:,} weights in {str(target).removeprefix('torch.')}"


def _not_exported(out: Path) -> str:
    """Return why a folder without `BASE` is not exported, and what to use."""
    run = next((place / RUN for place in (out, out.parent) if (place / RUN).is_file()), None)
    content = None if run is None else read_json(run, f"export: {run}")
    program = content.get("settings", {}).get("program") if isinstance(content, dict) else None
    if program == "finetune.py":
        return (
            f"is a run of finetune.py, which writes transformers folders itself: use {out / 'model'} or "
            f"{out / 'adapter'}, or those of a step in {out / CHECKPOINTS}/stepN/"
        )
    if program == "train_megatron.py":
        return (
            "is a run of train_megatron.py: its checkpoints are Megatron-core's (torch_dist); convert them with "
            "Megatron Bridge or Megatron-LM's tools/checkpoint"
        )
    return f"has no folder {BASE!r}: it is not a run of train.py of this release"


def _dtype_of(out: Path) -> str:
    """Return the dtype in which the run trained."""
    content = read_json(out / RUN, f"export: {out / RUN}")
    settings = content.get("settings", {}) if isinstance(content, dict) else {}
    if settings.get("bf16.enabled"):
        return "bfloat16"
    return "float16" if settings.get("fp16.enabled") else "float32"


def load_weights(checkpoints: Path, tag: str) -> dict[str, torch.Tensor]:
    """Return the whole weights of a DeepSpeed checkpoint in fp32, by name. Raises MolsConfigError."""
    convert = compat.module("deepspeed.utils.zero_to_fp32").get_fp32_state_dict_from_zero_checkpoint
    place = checkpoints / tag
    if (place / "mp_rank_01_model_states.pt").is_file():
        raise MolsConfigError(f"export: {place} is of a tensor-parallel run, which is not converted")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if any(place.glob("*zero_pp_rank_*_optim_states.pt")):
                found: dict[str, torch.Tensor] = convert(str(checkpoints), tag=tag)
                return found
            state = torch.load(place / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
            return {name: value.float() for name, value in state["module"].items()}
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise MolsConfigError(f"export: {place} cannot be read: {one_line(error)}") from error
