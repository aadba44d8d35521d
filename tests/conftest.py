"""Settings of every test process: the CPU accelerator, one thread a process, no network, no display."""

from __future__ import annotations

from tests.helpers.harness import RANK_ENVIRONMENT, apply_environment

apply_environment(RANK_ENVIRONMENT)

import torch  # noqa: E402  (reads the environment above when it is imported)

torch.set_num_threads(1)
