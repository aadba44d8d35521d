"""Top-level keys of DeepSpeed's config. DeepSpeed ignores those that it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mols_ds.engines.deepspeed.compat import module

SECTIONS = {
    "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "flops_profiler", "tensor_parallel", "pipeline",
    "compile", "hybrid_engine",
}  # fmt: skip
"""Sections that its modules name nowhere by a constant."""


def misspelt_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return the top-level keys that DeepSpeed does not have and that resemble one of its keys -> that key."""
    known = known_keys()
    found: dict[str, str] = {}
    for key in keys:
        if key not in known and key != "mols":
            for near in difflib.get_close_matches(key, known, n=1, cutoff=0.8):
                found[key] = near
    return found


def known_keys() -> set[str]:
    """Return all lowercase strings of DeepSpeed's config modules: the top-level keys, and more."""
    known = set[str]()
    for name in ("constants", "zero.config", "config", "activation_checkpointing.config"):
        values = vars(module(f"deepspeed.runtime.{name}")).values()
        known |= {value for value in values if isinstance(value, str) and value.islower()}
    return known | SECTIONS
