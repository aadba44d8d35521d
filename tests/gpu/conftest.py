"""Skips this folder, with the reason, where there is no CUDA device or no Transformer Engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patches.machine import probe_machine

HERE = Path(__file__).parent


def missing() -> str:
    """What keeps these tests from running here, or ""."""
    machine = probe_machine()
    if machine.capability is None:
        return "no CUDA device"
    return "" if machine.engine is not None else f"no Transformer Engine: {machine.engine_missing}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
