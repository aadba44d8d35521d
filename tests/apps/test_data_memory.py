"""The memory of tokenizing does not grow with the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.apps.command import ROOT

pytestmark = pytest.mark.jobs
MEGABYTE = 1 << 20


def tokenized(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.apps.tokenizing", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.tier("all")
def test_memory_is_flat_over_8_and_32_megabytes(tmp_path: Path) -> None:
    """24 MB more of text, which would be held as at least as much memory."""
    small, large = tokenized(tmp_path, ".txt", "8", "32")
    assert large["tokens"] > 3.9 * small["tokens"]
    assert large["peak"] - small["peak"] < 12 * MEGABYTE


@pytest.mark.timeout(7200)
@pytest.mark.tier("full")
def test_memory_is_flat_up_to_a_gigabyte(tmp_path: Path) -> None:
    """Each size in a process of its own. Readers of JSONL hold chunks of 10 MB."""
    found = [tokenized(tmp_path, ".jsonl", size)[0] for size in ("250", "500", "1000")]
    print(json.dumps(found))
    assert max(line["peak"] for line in found) - found[0]["peak"] < 64 * MEGABYTE
