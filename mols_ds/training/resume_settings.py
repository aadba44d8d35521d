"""Decide, for each setting of a run, what applies when the run resumes with another value.

`core/resume_rules.py` decides the same for the keys of the "mols" section.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsCheckpointError

Rule = Literal["refused", "applies", "checkpoint", "longer", "free"]
Settings = Mapping[str, object]
"""Setting by its name for the user (`--seed`, `optimizer.params.lr`, `run.steps`) -> plain JSON value."""

ORDER = "the order of the data depends on it"
WEIGHTS = "the checkpoint's weights do not fit it"
STATE = "the checkpoint's optimizer state does not fit it"

RULES: tuple[tuple[str, Rule, str], ...] = (
    ("program", "refused", "another program wrote this run"),
    ("processes", "free", ""),  # the loader refuses what does not fit: docs/checkpoints.md
    ("mols.*", "free", ""),  # core/resume_rules.py
    # train.py, finetune.py
    ("--steps", "longer", "a run can be extended, not cut"),
    ("--seed", "refused", ORDER),
    ("--seq-len", "refused", ORDER),
    ("--cutoff", "refused", ORDER),
    ("--method", "refused", WEIGHTS),
    ("--lora-dropout", "applies", ""),
    ("--lora-*", "refused", WEIGHTS),
    ("--eval-*", "applies", ""),
    ("--attention", "applies", ""),
    ("--compile", "applies", ""),
    ("--*", "free", ""),  # saving, logging, activation checkpointing: no number of the training depends on them
    # the data and the model, by content: paths may change
    ("text.*", "refused", "it is not the text of this run"),
    ("model.*dropout*", "applies", ""),
    ("model.attn_pdrop", "applies", ""),
    ("model.resid_pdrop", "applies", ""),
    ("model.embd_pdrop", "applies", ""),
    ("model.recompute_*", "free", ""),
    ("model.*fusion*", "free", ""),
    ("model.attention_backend", "free", ""),
    ("model.*", "refused", WEIGHTS),
    # DeepSpeed's config
    ("optimizer.type", "refused", STATE),
    ("optimizer.source", "refused", STATE),
    *((f"optimizer.params.{key}", "applies", "") for key in ("lr", "betas", "eps", "weight_decay", "momentum")),
    ("optimizer.params.torch_adam", "free", ""),
    ("optimizer.params.*", "refused", STATE),
    ("train_batch_size", "refused", ORDER),
    ("train_micro_batch_size_per_gpu", "free", ""),
    ("gradient_accumulation_steps", "free", ""),
    ("bf16.enabled", "refused", STATE),
    ("fp16.enabled", "refused", STATE),
    ("fp16.initial_scale_power", "checkpoint", "the checkpoint has a loss scale"),
    ("fp16.hysteresis", "checkpoint", "the checkpoint has a loss scale"),
    *(
        (f"{section}.*", "free", "")  # where and how, not what: the loader refuses what does not fit
        for section in (
            "zero_optimization", "checkpoint", "tensor_parallel", "activation_checkpointing", "aio", "tensorboard",
            "wandb", "csv_monitor", "comet", "comms_logger", "flops_profiler",
        )
    ),
    ("steps_per_print", "free", ""),
    ("wall_clock_breakdown", "free", ""),
    ("memory_breakdown", "free", ""),
    ("dump_state", "free", ""),
    # train_megatron.py
    ("run.steps", "longer", "a run can be extended, not cut"),
    ("run.seed", "refused", ORDER),
    ("run.seq_len", "refused", ORDER),
    ("run.eval_*", "applies", ""),
    ("run.*", "free", ""),
    ("batch.global", "refused", ORDER),
    ("batch.micro", "free", ""),
    ("parallel.*", "free", ""),
    ("data.*", "free", ""),  # `text` compares the content
    ("precision.dtype", "refused", STATE),
    ("optimizer.name", "refused", STATE),
    ("*", "applies", ""),
)  # fmt: skip
"""(pattern of settings, what applies, why). The first pattern that matches a setting counts.

refused: the run does not resume. applies: this run's value, and that is printed. checkpoint: the checkpoint's, and that
is printed. longer: a larger value applies, a smaller one is refused. free: this run's value, not printed."""


def rule_of(setting: str) -> tuple[Rule, str]:
    """Return (what applies, why) for a setting."""
    return next((rule, why) for pattern, rule, why in RULES if fnmatchcase(setting, pattern))


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings as one level, with names such as `optimizer.params.lr`."""
    return dict(_flat(values, prefix))


def _flat(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


ELSEWHERE = ("config", "model", "data", "tokenizer", "out", "resume", "overwrite", "lr", "optimizer")
"""Arguments whose effect is in other settings: the config, the model's keys, the text."""


def job_settings(
    program: str, args: argparse.Namespace, config: JsonObject, *, model: JsonObject, text: JsonObject, processes: int
) -> dict[str, object]:
    """Return all resolved settings of train.py or finetune.py.

    Args:
        config: the resolved DeepSpeed config.
        model: the model's configuration; the versions in it and its paths are left out.
        text: digests of the data.
    """
    given = {f"--{key.replace('_', '-')}": value for key, value in vars(args).items() if key not in ELSEWHERE}
    plain = {key: str(value) if isinstance(value, Path | tuple) else value for key, value in given.items()}
    own = {key: value for key, value in model.items() if key not in ("transformers_version", "_name_or_path")}
    return {
        "program": program,
        "processes": processes,
        **plain,
        **flatten(own, "model."),
        **flatten(text, "text."),
        **flatten(config),
    }


def compare(saved: Settings, now: Settings) -> list[str]:
    """Compare the settings of a run with those that it is resumed with.

    Returns:
        One line for each setting where another value than before applies, or where the checkpoint's stays.

    Raises:
        MolsCheckpointError: settings with which the run cannot continue, all in one line.
    """
    refused: list[str] = []
    said: list[str] = []
    for key in dict.fromkeys([*saved, *now]):
        before, value = saved.get(key), now.get(key)
        if before == value:
            continue
        rule, why = rule_of(key)
        differs = f"{key} is {_text(value)} and was {_text(before)}"
        if rule == "refused" or (rule == "longer" and not _longer(before, value)):
            refused.append(f"{differs} ({why})")
        elif rule == "checkpoint":
            said.append(f"{differs}: no effect, {why}")
        elif rule != "free":
            said.append(f"{differs}: this run's value applies")
    if refused:
        raise MolsCheckpointError(f"--resume: {'; '.join(refused)}")
    return said


def _longer(before: object, value: object) -> bool:
    return isinstance(before, int) and isinstance(value, int) and value > before


def _text(value: object) -> str:
    return "not set" if value is None else str(value)
