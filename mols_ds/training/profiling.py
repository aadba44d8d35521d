"""Trace some updates with torch's profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

SKIPPED = 5
"""Updates before the trace: compilation, warm-up of caches."""


class Trace:
    """Trace updates `SKIPPED` + 2 to `SKIPPED` + 1 + `updates` of a process to FOLDER/trace.json (Chrome's format)."""

    def __init__(self, folder: Path, updates: int) -> None:
        self.path = folder / "trace.json"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        planned = torch.profiler.schedule(wait=SKIPPED, warmup=1, active=updates, repeat=1)
        self._profiler = torch.profiler.profile(
            activities=activities, schedule=planned, on_trace_ready=self._write, record_shapes=True
        )
        self._profiler.start()

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.path))

    def step(self) -> None:
        """Count an update."""
        self._profiler.step()

    def close(self) -> None:
        """Write an unfinished trace."""
        self._profiler.stop()
