"""A line of the log, the numbers in it, and what monitors get."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from mols_ds.training import progress
from mols_ds.training.checkpointer import Retention
from mols_ds.training.progress import Progress, parts
from mols_ds.training.speed import flops_per_token, peak_flops, peak_memory
from mols_ds.training.trainer import events

LINE: dict[str, Any] = {
    "step": 3,
    "loss": 5.25,
    "lr": 2e-3,
    "multipliers": {"qk": 1.5},
    "phase": "fixed",
    "tokens_per_second": 12345.6,
    "memory_bytes": 3 << 29,
}
FULL = {**LINE, "val_loss": 5.5, "grad_norm": 0.75, "mfu": 0.4125, "applied_lrs": {"qk": 3e-3}, "snr": {"qk": None}}


def test_a_line_has_what_is_known() -> None:
    assert ", ".join(parts(LINE)) == "loss 5.250, rate 0.002, 12,346 tokens/s, 1.50 GiB, MoLS fixed"
    text = ", ".join(parts({**FULL, "phase": "disabled"}))
    assert text == ("loss 5.250, held-out 5.500, rate 0.002, gradient norm 0.75, 12,346 tokens/s, 1.50 GiB, MFU 41.2%")


def test_monitors_get_numbers_alone() -> None:
    assert events(FULL, {"qk": 1.5}) == {
        "loss": 5.25, "val_loss": 5.5, "lr": 2e-3, "grad_norm": 0.75, "tokens_per_second": 12345.6,
        "memory_bytes": 3 << 29, "mfu": 0.4125, "alpha_qk": 1.5, "multiplier_qk": 1.5, "applied_lr_qk": 3e-3,
    }  # fmt: skip


def test_a_file_gets_the_lines_of_a_probe(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("out", 10, shown=True)
    for count in range(1, 33):
        bar.probing(count, 32)
    bar.update(LINE)
    first, *others, last = capsys.readouterr().out.splitlines()
    assert first == "out: measuring gradients: batch 1 of 32"
    assert others == [f"out: measuring gradients: batch {count} of 32" for count in (8, 16, 24, 32)]
    assert last.startswith("out: step 3/10, 0 s, loss 5.250, rate 0.002, ")


def test_a_terminal_gets_the_same_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda: Console(file=screen, force_terminal=True, width=200))
    bar = Progress("[out]", 10, shown=True)
    bar.probing(1, 32)
    bar.update(LINE)
    bar.close()
    assert "[out]: measuring gradients: batch 1 of 32\n" in screen.getvalue()
    assert "[out]: step 3/10, 0 s, loss 5.250, rate 0.002, 12,346 tokens/s, 1.50 GiB, MoLS fixed\n" in screen.getvalue()


def test_ranks_that_show_nothing_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("out", 10, shown=False)
    bar.probing(1, 32)
    bar.update(LINE)
    assert not capsys.readouterr().out


def test_utilisation() -> None:
    """LLaMA 7B at 4,096 tokens: 6 x 6.6e9 + 12 x 32 x 4096 x 4096 = 46 GFLOP a token."""
    assert flops_per_token(6_607_000_000, 32, 4096, 4096) == pytest.approx(46.1e9, rel=1e-2)
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.float16) == 756e12
    assert peak_flops("NVIDIA H200", torch.float32) is None
    assert peak_flops("cpu", torch.bfloat16) is None
    assert peak_memory(torch.device("cpu")) > 10 << 20


@pytest.mark.parametrize(
    ("last", "every", "gone"),
    [
        (None, None, []),
        (2, None, [1, 2, 3, 4]),
        (1, None, [1, 2, 3, 4, 5]),
        (None, 3, [1, 2, 4, 5]),
        (2, 2, [1, 3]),
        (9, None, []),
    ],
)
def test_which_checkpoints_may_go(last: int | None, every: int | None, gone: list[int]) -> None:
    assert Retention(last, every).superseded([3, 1, 2, 6, 5, 4]) == gone
