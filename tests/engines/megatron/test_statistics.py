"""Per-group statistics and alphas of one model and its data on every grid, against the single-process reference.

Clipping acts and several micro-batches are accumulated throughout, so a statistic of clipped, of partly accumulated or
of unreduced gradients fails here; some tokens never occur in the samples and some in one of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.engines.megatron.cases import (
    GRIDS,
    HALF,
    LATENT,
    LATENTS,
    NAMES,
    OWN_TRAJECTORY,
    REFERENCE_NAMES,
    REFERENCE_RUNS,
    VARIANTS,
    WITHOUT,
    Case,
    others,
    outcomes,
    truth,
)
from tests.engines.megatron.grids import EMBEDDING, OUTPUT, REFERENCE
from tests.helpers.oracle import moments
from tests.helpers.oracle.models import GROUPS
from tests.helpers.oracle.reports import check_moved_once, check_values, row_of
from tests.helpers.oracle.statistics import GroupValues, alphas

pytestmark = pytest.mark.distributed

RTOL = 1e-5  # the requirement; measured: up to 7e-7
# bf16 with two tensor-parallel ranks: partial products are rounded to 8 bits before they are summed, which one process
# does not do. Measured: 0.3 %.
BF16_RTOL = {"dp2 bf16": RTOL, "dp2 bf16 plain": RTOL, "tp2 bf16": 0.01}


def in_order(values: dict[str, GroupValues]) -> dict[str, GroupValues]:
    """By the order of a report's groups."""
    return {group: values[group] for group in GROUPS if group in values}


def check_alphas(case: Case, outcome: dict[str, Any], rtol: float) -> None:
    """Of the chosen estimator; those of the median are formed from the report's own values, see `check_values`."""
    rows, plan = outcome["report"]["groups"], case.plan
    expected = truth(case.setup, plan).alphas
    if plan.estimator == "median":
        assert not plan.corrected
        snr = {group: row["snr_median"] for group, row in rows.items()}
        expected = alphas(snr, REFERENCE, steps=False, low=plan.low, high=plan.high)
    assert outcome["alphas"].keys() == expected.keys()
    for group, alpha in expected.items():
        assert float.fromhex(outcome["alphas"][group]) == pytest.approx(alpha, rel=rtol), group
        assert rows[group]["alpha"] == float.fromhex(outcome["alphas"][group])
        assert not rows[group]["clamped"]


@NAMES.parametrize("name", GRIDS | VARIANTS)
def test_every_estimator_equals_the_oracle(name: str) -> None:
    case = GRIDS.get(name) or VARIANTS[name]
    values = truth(case.setup, case.plan).values
    for outcome in outcomes(name):
        rows = outcome["report"]["groups"]
        check_values(rows, in_order(values), RTOL)
        check_moved_once(rows, values)
        check_alphas(case, outcome, RTOL)


@NAMES.parametrize("name", GRIDS | VARIANTS | OWN_TRAJECTORY | HALF)
def test_alphas_have_the_same_bits_on_every_rank(name: str) -> None:
    ranks = outcomes(name)
    assert len(set(ranks[0]["alphas"].values())) > 3, "the groups differ"
    for outcome in ranks:
        assert outcome["alphas"] == ranks[0]["alphas"]
        assert outcome["report"]["groups"] == ranks[0]["report"]["groups"]


@NAMES.parametrize("name", OWN_TRAJECTORY)
def test_training_modes_equal_the_oracle_on_its_own_trajectory(name: str) -> None:
    """Online: the gradients of updating steps. Moments: Adam's own m and v at the end of the window."""
    case = OWN_TRAJECTORY[name]
    values = truth(case.setup, case.plan).values
    for outcome in outcomes(name):
        if case.plan.mode != "moments":
            check_values(outcome["report"]["groups"], in_order(values), RTOL)
            check_alphas(case, outcome, RTOL)
            continue
        moments.check_rows(outcome["report"]["groups"], values)
        bounds = moments.alpha_bounds(values, case.plan.estimator, REFERENCE)
        for group, (low, high) in bounds.items():
            assert low <= float.fromhex(outcome["alphas"][group]) <= high, group


@NAMES.parametrize("name", HALF)
@REFERENCE_NAMES.reads("fp32 at the start")
def test_bf16_with_fp32_main_gradients(name: str) -> None:
    """Against a reference whose forward and backward passes are bf16 too and whose micro-batches are summed in fp32."""
    case = HALF[name]
    values = truth(case.setup, case.plan).values
    exact = truth(*REFERENCE_RUNS["fp32 at the start"]).values
    for outcome in outcomes(name):
        rows = outcome["report"]["groups"]
        for group, expected in values.items():
            assert rows[group]["elements"] == expected.elements
            for estimator in ("mean", "pooled", "damping", "step_rms"):
                value = expected.estimate(estimator, corrected=False)
                assert row_of(rows, group, estimator) == pytest.approx(value, rel=BF16_RTOL[name]), (group, estimator)
    rounding = max(abs(values[g].estimate("pooled", False) / exact[g].estimate("pooled", False) - 1) for g in values)
    assert rounding > 10 * RTOL, "the reference's passes were rounded to bf16"


@NAMES.parametrize("name", VARIANTS)
def test_overlap_and_recomputation_change_nothing(name: str) -> None:
    """The same alphas as the same grid without; the order of some sums may differ."""
    without = WITHOUT[name]
    ours, theirs = outcomes(name)[0]["alphas"], outcomes(without)[0]["alphas"]
    assert VARIANTS[name].plan == GRIDS[without].plan and VARIANTS[name].setup != GRIDS[without].setup
    for group, alpha in theirs.items():
        assert float.fromhex(ours[group]) == pytest.approx(float.fromhex(alpha), rel=RTOL), group


@NAMES.parametrize("name", GRIDS | VARIANTS | OWN_TRAJECTORY)
def test_every_logical_element_is_owned_once(name: str) -> None:
    """The flat ranges that the ranks measure, mapped to logical elements by slicing a table of their numbers."""
    case = (GRIDS | VARIANTS | OWN_TRAJECTORY)[name]
    masks = truth(case.setup, case.plan).masks
    numbers = {key: torch.arange(mask.numel()).view(mask.shape) for key, mask in masks.items()}
    seen = {key: torch.zeros(mask.numel(), dtype=torch.int64) for key, mask in masks.items()}
    for outcome in outcomes(name):
        for key, first, numel in outcome["owned"]:
            local = outcome["weights"][key].of(key, numbers[key]).reshape(-1)
            seen[key].index_add_(0, local[first : first + numel], torch.ones(numel, dtype=torch.int64))
    assert {key: Counter(count.tolist()) for key, count in seen.items()} == {
        key: {1: mask.numel()} for key, mask in masks.items()
    }


@NAMES.parametrize("name", GRIDS)
def test_a_probe_takes_no_step(name: str) -> None:
    plan = GRIDS[name].plan
    for outcome in outcomes(name):
        assert outcome["steps"] == len(outcome["norms"]) == plan.updates
        assert outcome["phases"] == [
            *["waiting"] * plan.start,
            *["calibrating"] * plan.samples,
            *["ramping"] * (plan.ramp_end - plan.start),
            *["fixed"] * (plan.updates - plan.ramp_end + 1),
        ]


@REFERENCE_NAMES.reads("mean")
def test_some_tokens_never_occur_and_some_once() -> None:
    values = truth(*REFERENCE_RUNS["mean"]).values
    assert values["embedding"].never_moved > 0 and values["embedding"].moved_once > 0


@NAMES.reads("dp2 moments")
def test_adams_moments_do_not_tell_some_elements_from_noiseless_ones() -> None:
    case = OWN_TRAJECTORY["dp2 moments"]
    head = truth(case.setup, case.plan).values["head"]
    assert head.left_out()[0] > head.v_below_m2() > 0, "the cut of Adam's moments leaves out elements with v > m^2 too"


@NAMES.reads("pp2 dp2")
def test_some_ranks_lack_a_whole_group() -> None:
    groups_of = [{k for k, _, _ in outcome["owned"]} for outcome in outcomes("pp2 dp2")]
    assert any(EMBEDDING not in names for names in groups_of) and any(OUTPUT not in names for names in groups_of)


@NAMES.reads("pp2 dp2")
def test_a_shard_boundary_cuts_a_fused_projection() -> None:
    cut = {
        key
        for outcome in outcomes("pp2 dp2")
        for key, _, numel in outcome["owned"]
        if numel < outcome["weights"][key].values.numel()
    }
    assert any("linear_qkv" in key for key in cut), f"no fused projection is cut inside: {cut}"


PARTS = {
    "tp2 plain": ["FP32Optimizer"],
    "dp2": ["DistributedOptimizer"],
    "ep2": ["DistributedOptimizer"] * 2,
    "dp2 bf16 plain": ["Float16OptimizerWithFloat16Params"],
}


@NAMES.parametrize("name", PARTS)
def test_the_optimizers_are_those_that_were_meant(name: str) -> None:
    assert outcomes(name)[0]["parts"] == PARTS[name]


# --- latent attention -----------------------------------------------------------------------------------------------

# 2 layers, hidden 32, 4 heads of 8 + 4 (key) and 8 (value), latent 16, query latent 16, vocabulary 128, MLP of 64.
_LAYER = {
    "qk": 16 * 32 + 48 * 16 + 4 * 32 + 32 * 16,  # query down and up, rotary key, keys of kv_up
    "vo": 16 * 32 + 32 * 16 + 32 * 32,  # latent of kv_down, values of kv_up, linear_proj
    "mlp": 3 * 32 * 64,
}


@LATENTS.reads(LATENT)
def test_latent_attention_counts_under_tensor_parallelism() -> None:
    """Megatron's local layers compute other gradients of latent attention under tensor parallelism: counts alone."""
    for outcome in others("latent", LATENT):
        norms = outcome["elements"].pop("other")
        assert norms == outcome["norms"]
        assert outcome["elements"] == {
            "embedding": 128 * 32,
            "head": 128 * 32,
            **{group: 2 * count for group, count in _LAYER.items()},
        }
