"""Which `"auto"` of a DeepSpeed config who replaces by a value.

DeepSpeed accepts the word in a few sections only; transformers' Trainer and accelerate introduced it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mols_ds.errors import MolsConfigError
from mols_ds.optim.choose import AUTO

TRAINER = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    *(f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay")),
    *(f"scheduler.params.{key}" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")),
    "fp16.enabled",
    "bf16.enabled",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)
"""Filled from TrainingArguments and the model (transformers, HfTrainerDeepSpeedConfig in integrations/deepspeed.py)."""
ACCELERATE = (
    "steps_per_print",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
)
"""Filled with accelerate's own settings, under a Trainer too (DeepSpeedPlugin in utils/dataclasses.py). Every other
"auto" that is left is a ValueError there."""
DEFAULTED = (
    "fp16",
    "bf16",
    "zero_optimization",
    "torch_autocast",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "aio",
)
"""Sections in which DeepSpeed itself reads "auto" as its own default (DeepSpeedConfigModel in
runtime/config_utils.py)."""
REFUSED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
           "steps_per_print", "optimizer.", "scheduler.")  # fmt: skip
"""Keys, and beginnings of keys, in which "auto" is an error of DeepSpeed's, mostly a TypeError."""


def auto_keys(config: Mapping[str, Any], within: str = "") -> list[str]:
    """The keys whose value is "auto", such as "optimizer.params.lr". The "mols" section is left out: there it is a word
    of its own."""
    found = []
    for key, value in config.items():
        if isinstance(value, str) and value == AUTO:
            found.append(f"{within}{key}")
        elif isinstance(value, Mapping) and (within or key != "mols"):
            found += auto_keys(value, f"{within}{key}.")
    return found


def refused_by_deepspeed(key: str) -> bool:
    """Whether "auto" as the value of this key is an error of DeepSpeed's, where nobody has replaced it before."""
    return key.startswith(REFUSED)


def check_no_auto(config: Mapping[str, Any]) -> None:
    """Raise `MolsConfigError` for the "auto" that DeepSpeed would stumble over."""
    keys = [key for key in auto_keys(config) if refused_by_deepspeed(key)]
    if keys:
        raise MolsConfigError(
            f'DeepSpeed config: "auto" in {", ".join(keys)}, which DeepSpeed does not accept; give values, or use what '
            "fills them in: transformers' Trainer, or this package's train.py and finetune.py"
        )
