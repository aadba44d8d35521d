"""Ranks without any element, rows of tokens that the ranks cut, and ranks whose gradients differ."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import mols_ds
from mols_ds.errors import MolsError
from tests.engines.torch.calibration_run import SETTINGS, adamw
from tests.engines.torch.models import EMPTY, Tiny, masks, sharded_by_rows, tokens
from tests.engines.torch.parallel import full_weights
from tests.helpers.harness import Results, run_cases, run_ranks
from tests.helpers.oracle import moments
from tests.helpers.oracle.adamw import ElementwiseAdamW, multipliers, ramp
from tests.helpers.oracle.reports import check_rows
from tests.helpers.oracle.statistics import alphas, group_values
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD = 3
START, SAMPLES, RAMP_END, UPDATES = 1, 6, 9, 11
SECTION = {"start": START, "samples": SAMPLES, "ramp_end": RAMP_END, "estimator": "damping", "reference": "vo"}
BOUNDS = {"alpha_min": 1e-3, "alpha_max": 1e3}
ADAM = replace(SETTINGS, clip=0.05)  # far below the norm
RTOL, ATOL = 1e-5, 1e-5
SIZES = {"empty": EMPTY, "cut row": (12, 101)}
"""Way to run -> width and tokens. The 2904 elements of the second model are split at 968 = 80 * 12 + 8, inside of row
80 of the embedding, and at 1936, inside of a row of the head."""
Case = tuple[str, str, str]  # way to run, mode, "unseen_rows"
MODES = ("probe", "online", "moments")
CASES = Cases(
    [
        *(("empty", mode, "exclude") for mode in MODES),
        *(("cut row", mode, "exclude") for mode in MODES),
        ("cut row", "online", "include"),
    ],
    quick=[("empty", "probe", "exclude"), ("cut row", "online", "exclude"), ("cut row", "online", "include")],
)


def made(how: str) -> Tiny:
    torch.manual_seed(0)
    return Tiny(0.0, *SIZES[how])


def data(how: str, iteration: int, rank: int) -> Tensor:
    """Ids below 81: row 80 occurs in every batch, the rows behind it never."""
    ids = tokens(iteration, rank, min(81, SIZES[how][1]))
    ids[0, 0] = ids[1, 3] = min(80, SIZES[how][1] - 1)
    return ids


def train(how: str, mode: str, unseen: str) -> dict[str, Any]:
    """On each rank: UPDATES updates of a loop that clips."""
    model = made(how)
    run = DistributedDataParallel(model) if how == "cut row" else sharded_by_rows(model)
    optimizer = adamw(model, ADAM)
    section = {**SECTION, **BOUNDS, "mode": mode, "unseen_rows": unseen}
    mols = mols_ds.attach(optimizer, run, section, total_steps=UPDATES)
    for iteration in range(UPDATES + (SAMPLES if mode == "probe" else 0)):
        run(data(how, iteration, dist.get_rank())).backward()
        mols.read_gradients()
        torch.nn.utils.clip_grad_norm_(run.parameters(), ADAM.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "owned": [tuple(item) for item in mols.controller.elements.ranges],
        "phase": mols.phase,
        "report": mols.report(),
        "alphas": mols.alphas,
        "multipliers": mols.multipliers,
        "weights": full_weights(model),
    }


@functools.cache
def results() -> Results:
    return run_cases(train, WORLD, CASES.wanted, timeout=60)


def twin(how: str, mode: str, unseen: str, found: dict[str, float]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """In one process: the values of each group, and the weights after UPDATES updates with these alphas."""
    model = made(how)
    optimizer, mask = ElementwiseAdamW(model, masks(model), ADAM), masks(model)
    samples: list[dict[str, Tensor]] = []
    values: dict[str, Any] = {}
    seen = torch.zeros(SIZES[how][1], dtype=torch.bool)
    moved, ended = seen, START if mode == "probe" else START + SAMPLES
    t = iteration = 0
    while t < UPDATES:
        model.zero_grad()
        every = [data(how, iteration, rank) for rank in range(WORLD)]
        for ids in every:
            (model(ids) / WORLD).backward()
        sample = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        iteration += 1
        if t >= START and len(samples) < SAMPLES:
            samples.append(sample)
            seen[torch.cat(every).unique()] = True
            if len(samples) == SAMPLES and mode != "moments":
                values = dict(group_values(samples, mask, seen if unseen == "exclude" else None))
            if mode == "probe":
                continue
        if t == START + SAMPLES - 1:
            moved = (optimizer.v["embed_tokens.weight"] != 0).any(1)
        optimizer.step(sample, 1.0, multipliers(found, ramp(t, ended, RAMP_END, "linear")))
        assert optimizer.norm > ADAM.clip, "clipping must act"
        t += 1
        if mode == "moments" and t == START + SAMPLES:
            kept = {name: (optimizer.m[name].clone(), optimizer.v[name].clone()) for name in mask}
            values = dict(moments.moment_values(kept, mask, t, (ADAM.beta1, ADAM.beta2), moved))
    return values, {name: p.detach() for name, p in model.named_parameters()}


@CASES.parametrize("case", ids="-".join)
def test_equals_the_twin(case: Case) -> None:
    how, mode, unseen = case
    ranks = results()[case]
    first = ranks[0]
    rows = first["report"]["groups"]
    values, weights = twin(*case, first["alphas"])
    if mode == "moments":
        moments.check_rows(rows, values)
    else:
        if unseen == "include":
            assert all(row["unseen_share"] is None for row in rows.values())
            rows = {group: {**row, "unseen_share": 0.0} for group, row in rows.items()}
        elif how == "cut row":
            assert rows["head"]["unseen_share"] == rows["embedding"]["unseen_share"] >= 20 / 101
        check_rows(rows, values, "damping", RTOL)
    expected = alphas({group: row["snr"] for group, row in rows.items()}, "vo", steps=True, low=1e-3, high=1e3)
    assert first["alphas"] == pytest.approx(expected, rel=RTOL)
    for rank in ranks:
        assert rank["phase"] == "fixed"
        assert [rank[key] for key in ("report", "alphas", "multipliers")] == [
            first[key] for key in ("report", "alphas", "multipliers")
        ]
        assert max(abs(factor - 1) for factor in rank["multipliers"].values()) > 0.05
        errors = {name: float((rank["weights"][name] - w).abs().max()) for name, w in weights.items()}
        assert max(errors.values()) <= ATOL, max(errors.items(), key=lambda item: item[1])


@CASES.parametrize("case", [case for case in CASES if case[0] == "empty"], ids="-".join)
def test_the_last_rank_is_without_elements(case: Case) -> None:
    total = sum(p.numel() for p in made("empty").parameters())
    owned = [rank["owned"] for rank in results()[case]]
    assert owned[2] == [] and [sum(item[3] for item in ranges) for ranges in owned] == [total // 2, total // 2, 0]


@CASES.parametrize("case", [case for case in CASES if case[0] == "cut row"], ids="-".join)
def test_the_ranks_cut_rows_of_tokens(case: Case) -> None:
    before, after = (results()[case][rank]["owned"] for rank in (0, 1))
    assert before[0][:1] == after[0][:1] == ("embed_tokens.weight",)
    assert after[0][1] == before[0][1] + before[0][3] == 80 * 12 + 8
    name, start, *_ = results()[case][2]["owned"][0]
    assert name == "lm_head.weight" and start % 12


@CASES.reads(("cut row", "online", "exclude"), ("cut row", "online", "include"))
def test_rows_that_did_not_occur_count_only_where_they_are_included() -> None:
    without, included = (results()["cut row", "online", unseen][0]["alphas"] for unseen in ("exclude", "include"))
    assert without["head"] != pytest.approx(included["head"], rel=0.01)
    assert without["qk"] == pytest.approx(included["qk"], rel=1e-3)


# --- gradients of plain parameters -----------------------------------------------------------------------------------


def without_ddp(differ: bool) -> str:
    """What a sample says on each rank, of a plain model on each."""
    model = made("empty")
    optimizer = adamw(model, ADAM)
    mols_ds.attach(optimizer, model, {**SECTION, "mode": "online", "start": 0}, total_steps=UPDATES)
    model(data("empty", 0, dist.get_rank() if differ else 0)).backward()
    try:
        optimizer.step()
    except MolsError as error:
        return str(error)
    return ""


def other_lengths() -> str:
    """What attach says where loaders of another length gave the number of steps."""
    model = made("empty")
    with pytest.raises(MolsError) as error:
        mols_ds.attach(adamw(model, ADAM), model, {"start": 0.1}, total_steps=100 + 20 * dist.get_rank())
    return str(error.value)


def both() -> list[str]:
    return [*(without_ddp(differ) for differ in (False, True)), other_lengths()]


def test_what_differs_between_ranks_is_an_error_on_every_rank() -> None:
    for alike, different, lengths in run_ranks(both, 2, timeout=60):
        assert lengths.startswith("start and end of the ramp (total_steps): [12, 12] on rank 1, but [10, 10] on rank 0")
        assert alike == ""
        assert "the ranks have different gradients of the same parameters" in different
        assert "wrap the model in DistributedDataParallel, or average the gradients" in different
