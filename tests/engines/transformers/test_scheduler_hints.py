"""Length of the run and warm-up from a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_lr
from transformers import get_scheduler

from mols_ds.optim.scheduler_hints import Hints, scheduler_hints

Make = Callable[[torch.optim.Optimizer], Any]


def hf(name: str, **specific: Any) -> Make:
    return lambda o: get_scheduler(
        name, o, num_warmup_steps=3, num_training_steps=40, scheduler_specific_kwargs=specific or None
    )


def sequence(*makes: Make, milestones: list[int]) -> Make:
    return lambda o: torch_lr.SequentialLR(o, [make(o) for make in makes], milestones)


WARMUP: Make = lambda o: torch_lr.LinearLR(o, 0.1, total_iters=10)  # noqa: E731
CONSTANT: Make = lambda o: torch_lr.ConstantLR(o, 1.0, 1)  # noqa: E731
COSINE: Make = lambda o: torch_lr.CosineAnnealingLR(o, 90)  # noqa: E731
DECAY: Make = lambda o: torch_lr.LinearLR(o, 1.0, 0.1, total_iters=20)  # noqa: E731

CASES: dict[str, tuple[Make, Hints]] = {
    "linear": (hf("linear"), (40, 3)),
    "cosine": (hf("cosine"), (40, 3)),
    "cosine_with_min_lr": (hf("cosine_with_min_lr", min_lr=1e-5), (40, 3)),
    "polynomial": (hf("polynomial"), (40, 3)),
    "constant_with_warmup": (hf("constant_with_warmup"), (None, 3)),
    "warmup_stable_decay": (hf("warmup_stable_decay", num_decay_steps=10), (40, 3)),
    "warm-up and cosine": (sequence(WARMUP, COSINE, milestones=[10]), (100, 10)),
    "warm-up, constant, cosine": (sequence(WARMUP, CONSTANT, COSINE, milestones=[10, 50]), (140, 10)),
    "warm-up, constant, decay": (sequence(WARMUP, CONSTANT, DECAY, milestones=[10, 50]), (None, 10)),
    "nested": (sequence(WARMUP, sequence(CONSTANT, COSINE, milestones=[5]), milestones=[10]), (105, 10)),
    "without a warm-up": (sequence(CONSTANT, COSINE, milestones=[5]), (95, None)),
    "chained": (lambda o: torch_lr.ChainedScheduler([WARMUP(o), COSINE(o)]), (90, 10)),
    "one cycle": (lambda o: torch_lr.OneCycleLR(o, 1e-3, total_steps=60), (60, None)),
    "polynomial of torch": (lambda o: torch_lr.PolynomialLR(o, 30), (30, None)),
    "plateau": (torch_lr.ReduceLROnPlateau, (None, None)),
    "step": (lambda o: torch_lr.StepLR(o, 10), (None, None)),
}


@pytest.mark.parametrize("name", CASES)
def test_length_and_warm_up(name: str) -> None:
    make, expected = CASES[name]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert scheduler_hints(make(optimizer)) == expected


def test_without_a_scheduler() -> None:
    assert scheduler_hints(None) == (None, None)
