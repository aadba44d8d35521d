"""Skips a file of this folder, with the reason, where this machine lacks what it needs: a CUDA device and, but for
`CUDA_ALONE`, NVIDIA apex (test_apex.py) or Transformer Engine (the others)."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from megatron_patches.machine import Machine, probe_machine

HERE = Path(__file__).parent
CUDA_ALONE = ("test_copies.py",)
probed = functools.cache(probe_machine)


def missing(machine: Machine, file: str) -> str:
    """What keeps the tests of a file from running on a machine, or ""."""
    if file == "test_scripts.py":
        return ""
    if machine.capability is None:
        return "no CUDA device"
    if file == "test_apex.py":
        return "" if machine.apex else f"no NVIDIA apex: {machine.apex_missing}"
    if machine.engine is not None or file in CUDA_ALONE:
        return ""
    return f"no Transformer Engine: {machine.engine_missing}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in [item for item in items if HERE in item.path.parents]:
        if reason := missing(probed(), item.path.name):
            item.add_marker(pytest.mark.skip(reason=reason))
