"""What the method loads when it is imported: no engine, no model library, nothing that draws. One fresh interpreter."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("deepspeed", "megatron", "transformer_engine")
HEAVY = (*ENGINES, "transformers", "matplotlib", "rich")
CORE = ["mols_ds.core", *sorted(f"mols_ds.core.{file.stem}" for file in (ROOT / "mols_ds/core").glob("[!_]*.py"))]
LIGHT = [
    "mols_ds",
    "mols_ds.errors",
    *CORE,
    "mols_ds.report.table",
    "mols_ds.report.files",
    "mols_ds.report.fixed_alphas",
    # The tables of private names, which the launcher and doctor read.
    "mols_ds.engines.deepspeed.compat",
    "megatron_patches.compat",
]
WATCH = f"""
import importlib, json, sys
seen = []
for name in {LIGHT!r}:
    importlib.import_module(name)
    seen.append([name, sorted({set(HEAVY)!r} & set(sys.modules))])
print(json.dumps(seen))
"""


@functools.cache
def loaded() -> dict[str, list[str]]:
    """Module -> which of HEAVY are loaded after it and those before it in LIGHT."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WATCH], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_loads_no_engine_and_nothing_that_draws(name: str) -> None:
    assert loaded()[name] == []


def test_the_list_is_not_empty() -> None:
    assert len(CORE) > 10
    assert "mols_ds.core.controller" in CORE
