"""Skips this folder, with the reason, where there is no CUDA device or, but for `CUDA_ALONE`, no Transformer Engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patches.machine import probe_machine

HERE = Path(__file__).parent
CUDA_ALONE = ("test_copies.py",)


def missing(file: str) -> str:
    """What keeps the tests of a file from running here, or ""."""
    machine = probe_machine()
    if machine.capability is None:
        return "no CUDA device"
    return (
        "" if machine.engine is not None or file in CUDA_ALONE else f"no Transformer Engine: {machine.engine_missing}"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and (reason := missing(item.path.name)):
            item.add_marker(pytest.mark.skip(reason=reason))
