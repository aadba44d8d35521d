"""Settings of every test process: the CPU accelerator, one thread a process, no network, no display."""

from __future__ import annotations

from tests.harness import RANK_ENVIRONMENT, apply_environment

apply_environment(RANK_ENVIRONMENT)

import pytest  # noqa: E402
import torch  # noqa: E402  (reads the environment above when it is imported)

torch.set_num_threads(1)

ONE_LAUNCH = {"test_statistics", "test_weights"}  # of tests/megatron: they look at the same runs


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share what is expensive stay in one process of `pytest -n`: those of a file, and all commands."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        folder, file = item.path.parent.name, item.path.stem
        shared = folder == "jobs" or (folder == "megatron" and file in ONE_LAUNCH)
        item.add_marker(pytest.mark.xdist_group(folder if shared else f"{folder}.{file}"))
