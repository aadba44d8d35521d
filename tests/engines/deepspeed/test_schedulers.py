"""The rate that is applied is the schedule's base rate times the multiplier at every step, whoever sets the base rate.

The model's gradient is exactly 1 for every element, so that plain SGD writes the applied rate into the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines.deepspeed.engines import STAGES, config
from tests.engines.deepspeed.state import full_weights, inner_optimizer
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.adamw import multipliers, ramp
from tests.helpers.tiers import Cases

WORLD, STEPS, TOTAL = 2, 14, 20
START, RAMP_END = 2, 8
BASE_LR = 0.25
ALPHAS = {"embedding": 4.0, "head": 2.0, "qk": 0.5, "vo": 1.0, "mlp": 1.5}
WIDTH, FEATURES, TOKENS = 6, 5, 8
SCHEDULES = ("none", "lambda", "WarmupLR", "WarmupCosineLR", "transformers cosine", "user", "two groups")

# A weight is a sum of up to 14 rates below 1 and stays below 8: one float32 rounding of it, before and after the step.
WEIGHT_ATOL = 4 * 8 * torch.finfo(torch.float32).eps
NORM_RTOL = 1e-5  # the layer norm divides by sqrt(1 + 1e-5), which makes its gradient 1 - 5e-6


class Ones(nn.Module):
    """Parameters of every module group, named as in LLaMA; the loss is the sum of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, WIDTH)
        self.q_proj = nn.Linear(WIDTH, FEATURES, bias=False)
        self.k_proj = nn.Linear(WIDTH, FEATURES, bias=False)
        self.v_proj = nn.Linear(WIDTH, FEATURES, bias=False)
        self.up_proj = nn.Linear(WIDTH, FEATURES, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, ones: Tensor, tokens: Tensor) -> Tensor:
        """ones: (1, WIDTH), all 1. tokens: each id once. d loss / d w = 1 for every weight w."""
        linears = [self.q_proj, self.k_proj, self.v_proj, self.up_proj, self.lm_head]
        total = sum(linear(ones).sum() for linear in linears) + self.embed_tokens(tokens).sum()
        signs = torch.tensor([[1.0, -1.0] * (WIDTH // 2)])  # normalises to itself, up to the norm's eps
        normed = self.norm(signs) * signs  # = weight + bias * signs
        result: Tensor = total + normed.sum()
        return result


GROUP_OF = {
    "embed_tokens.weight": "embedding",
    "q_proj.weight": "qk",
    "k_proj.weight": "qk",
    "v_proj.weight": "vo",
    "up_proj.weight": "mlp",
    "norm.weight": "other",
    "lm_head.weight": "head",
}  # norm.bias has gradients of both signs and is left out


def user_rate(step: int) -> float:
    return BASE_LR * (1.0 + 0.5 * (step % 3))


def _scheduler(kind: str, optimizer: torch.optim.Optimizer) -> tuple[Any, dict[str, Any]]:
    """(a client scheduler or None, the "scheduler" section of the config)."""
    if kind in ("lambda", "two groups"):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (1 + t)), {}
    if kind == "transformers cosine":
        from transformers import get_cosine_schedule_with_warmup

        return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=RAMP_END, num_training_steps=TOTAL), {}
    if kind == "WarmupLR":
        parameters = {"warmup_min_lr": 0.0, "warmup_max_lr": BASE_LR, "warmup_num_steps": RAMP_END}
        return None, {"scheduler": {"type": "WarmupLR", "params": parameters}}
    if kind == "WarmupCosineLR":
        parameters = {"total_num_steps": TOTAL, "warmup_num_steps": RAMP_END}
        return None, {"scheduler": {"type": "WarmupCosineLR", "params": parameters}}
    return None, {}


def _run(stage: int, kind: str, initialize: Callable[..., Any], mols: dict[str, Any] | None) -> dict[str, list[Any]]:
    model = Ones()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": [*matrices, *vectors], "lr": BASE_LR}]
    if kind == "two groups":
        groups = [{"params": matrices, "lr": BASE_LR}, {"params": vectors, "lr": 2 * BASE_LR}]
    optimizer = torch.optim.SGD(groups, lr=BASE_LR, foreach=False)
    scheduler, section = _scheduler(kind, optimizer)
    ds_config = config(stage, mols, micros=1, gradient_clipping=0.0, **section)
    ds_config["train_micro_batch_size_per_gpu"] = 1
    engine = initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)[0]
    log: dict[str, list[Any]] = {"base": [], "after": [], "moved": [], "applied": [], "multipliers": []}
    weights = full_weights(engine)
    for step in range(STEPS):
        if kind == "user":
            for group in inner_optimizer(engine).param_groups:
                group["lr"] = user_rate(step)
        log["base"].append([group["lr"] for group in inner_optimizer(engine).param_groups])
        engine.backward(engine(torch.ones(1, WIDTH), torch.arange(TOKENS)))
        engine.step()
        log["after"].append((engine.get_lr(), [group["lr"] for group in inner_optimizer(engine).param_groups]))
        new = full_weights(engine)
        log["moved"].append({name: (weights[name].double() - new[name].double()).view(-1).tolist() for name in new})
        weights = new
        if mols is not None:
            log["applied"].append(dict(engine.mols.applied_lrs))
            log["multipliers"].append(dict(engine.mols.multipliers))
    engine.destroy()
    return log


def compare(stage: int, kind: str) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """On each rank: the same training by stock DeepSpeed and under fixed alphas."""
    import deepspeed

    import mols_ds

    section = {"fixed_alphas": ALPHAS, "start": START, "ramp_end": RAMP_END}
    assert dist.get_world_size() == WORLD
    return _run(stage, kind, deepspeed.initialize, None), _run(stage, kind, mols_ds.initialize, section)


CASES = Cases(  # each kind at one stage in the quick run, and at one more in "all"
    [(stage, kind) for kind in SCHEDULES for stage in STAGES],
    quick=lambda case: case[0] == SCHEDULES.index(case[1]) % 4,
    full=lambda case: case[0] % 2 != SCHEDULES.index(case[1]) % 2,
)


@functools.cache
def results() -> Results:
    return run_cases(compare, WORLD, CASES.wanted, timeout=120)


def expected_multipliers(step: int) -> dict[str, float]:
    return {**multipliers(ALPHAS, ramp(step, START, RAMP_END, "linear")), "other": 1.0}


@CASES.parametrize(("stage", "kind"))
def test_the_base_rate_is_that_of_stock(stage: int, kind: str) -> None:
    """Bit for bit, before and after every step, in the optimizer's groups and in `engine.get_lr()`."""
    for stock, ours in results()[stage, kind]:
        assert ours["base"] == stock["base"]
        assert ours["after"] == stock["after"]
        if kind != "none":
            assert len({rates[0] for rates in stock["base"]}) > 1, "the schedule moves"


@CASES.parametrize(("stage", "kind"))
def test_applied_rates_are_base_times_multiplier(stage: int, kind: str) -> None:
    for _, ours in results()[stage, kind]:
        for step in range(STEPS):
            seen = ours["multipliers"][step]
            assert seen == pytest.approx(expected_multipliers(step), rel=4 * torch.finfo(torch.float64).eps)
            base = ours["base"][step][0]
            applied = ours["applied"][step]
            for group in ALPHAS:
                assert applied[group] == base * seen[group], (step, group)


@CASES.parametrize(("stage", "kind"))
def test_the_weights_moved_by_these_rates(stage: int, kind: str) -> None:
    """Nothing compounds and nothing is left out: every element of every weight moved by base rate x multiplier."""
    for stock, ours in results()[stage, kind]:
        for step in range(STEPS):
            factors = expected_multipliers(step)
            for name, group in GROUP_OF.items():
                base = ours["base"][step][-1 if name == "norm.weight" else 0]
                expected = base * factors[group]
                for moved in ours["moved"][step][name]:
                    assert moved == pytest.approx(expected, rel=NORM_RTOL if "norm" in name else 0, abs=WEIGHT_ATOL)
                for moved in stock["moved"][step][name]:
                    assert moved == pytest.approx(base, rel=NORM_RTOL if "norm" in name else 0, abs=WEIGHT_ATOL)
