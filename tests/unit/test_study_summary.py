"""The numbers of a study's report against values from tables, closed forms or hand calculation."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import pytest

from mols_ds.apps.study.curves import Band, Curve, sensitivity, snr_curve, tokens_to_reach, validation_curve
from mols_ds.apps.study.paired import holm
from mols_ds.apps.study.relative import relative_cost
from mols_ds.apps.study.runs import Chosen, StudyRun, setting_text
from mols_ds.apps.study.summary import ArmRow, Summary, summarise, to_json
from tests.unit.study_results import NOISE, SEED_EFFECT, STEPS, TOKENS_PER_STEP, mols_result, result, study

ARMS = {"adam": {"a": 4.0, "b": 3.0}, "adam+mols": {"a": 3.9, "b": 2.95}, "lion": {"a": 4.2}}
PASSES = "2 measuring passes besides 10 steps"


def row(summary: Summary, model: str, arm: str) -> ArmRow:
    (found,) = [row for row in summary.rows if (row.model, row.arm) == (model, arm)]
    return found


# ---------------------------------------------------------------------- curves


def curve(*points: tuple[int, float]) -> Curve:
    return Curve([tokens for tokens, _ in points], [Band(loss, loss, loss) for _, loss in points])


def test_tokens_to_reach() -> None:
    falling = curve((100, 5.0), (200, 4.0), (400, 3.0))
    assert tokens_to_reach(falling, 3.5) == 300
    assert tokens_to_reach(falling, 4.0) == 200
    assert tokens_to_reach(falling, 5.5) == 100, "nothing is known before the first evaluation"
    assert tokens_to_reach(falling, 2.9) is None
    assert tokens_to_reach(curve((100, 5.0), (200, 3.0), (300, 4.0)), 4.0) == 150, "the first time"
    assert tokens_to_reach(curve((100, math.inf), (200, 3.0)), 4.0) == 200
    assert tokens_to_reach(curve((0, 3.0)), 4.0) is None, "no tokens give no ratio"
    assert tokens_to_reach(curve(), 4.0) is None


def test_mean_curve_is_over_the_evaluations_that_all_seeds_have() -> None:
    first = result("m", "x", 1e-3, 0, 2.0)
    second = result("m", "x", 1e-3, 1, 3.0)
    del second["val_curve"]["tokens"][3], second["val_curve"]["loss"][3]
    found = validation_curve([first, second])
    assert found.tokens == [100, 200, 300, 500, 600, 700, 800, 900, 1000]
    assert found.loss[0] == (5.5, 5.0, 6.0)
    assert found.loss[-1] == (2.5, 2.0, 3.0)
    assert found.final == 2.5
    assert validation_curve([]).final == math.inf


def test_a_curve_ends_with_the_final_loss_and_a_diverged_seed_makes_it_infinite() -> None:
    short = result("m", "x", 1e-3, 0, 2.0, val_curve={"step": [5], "tokens": [500], "loss": [3.0]})
    assert validation_curve([short]).tokens == [500, 1000]
    assert validation_curve([short]).final == 2.0
    gone = result("m", "x", 1e-3, 1, math.inf)
    both = validation_curve([result("m", "x", 1e-3, 0, 2.0), gone])
    assert both.tokens == list(range(100, 1001, 100))
    assert [math.isinf(point.mean) for point in both.loss] == [False] * 5 + [True] * 5


def test_sensitivity_is_the_best_over_the_other_settings() -> None:
    losses = {
        (("lr", 1e-3), ("params.rank", 4)): 3.0,
        (("lr", 1e-3), ("params.rank", 8)): 2.5,
        (("lr", 2e-3), ("params.rank", 4)): math.inf,
    }
    found = sensitivity(losses, {"lr": 1e-3, "params.rank": 8})
    assert found is not None
    assert (found.rates, found.losses, found.chosen) == ([1e-3, 2e-3], [2.5, math.inf], 1e-3)
    assert sensitivity({(("params.rank", 4),): 1.0}, {"params.rank": 4}) is None


def test_snr_joins_seeds_and_layers_and_tells_what_it_drops() -> None:
    runs = [
        {"snr": {"step": [1, 2], "groups": {"qk.0": [1.0, 2.0], "qk.1": [4.0, -1.0], "head": [None, math.nan]}}},
        {"snr": {"step": [1, 2], "groups": {"qk.0": [2.0, 2.0], "qk.1": [2.0, 2.0]}}},
        {"snr": {}},
    ]
    found = snr_curve(runs)
    assert found is not None
    assert found.seeds == 2
    assert found.steps == [1, 2]
    assert found.snr["qk"][0] == pytest.approx((2.0, 1.0, 4.0))
    assert found.snr["qk"][1] == pytest.approx((2.0, 2.0, 2.0))
    assert found.dropped == pytest.approx({"qk": 1 / 8, "head": 1.0})
    assert snr_curve([{"snr": {}}]) is None


# ---------------------------------------------------------------------- costs


def test_measured_costs_are_taken_as_they_are() -> None:
    measured = {"step_ratio": [1.1, 1.0, 1.2], "step_seconds": 0.3, "memory_bytes": 5, "memory_ratio": 0.5}
    cost = relative_cost(measured | {"memory_how": "live tensors", "accumulators": 7}, {}, {})
    assert cost == ((1.1, 1.0, 1.2), 0.3, 5, 0.5, 7, "live tensors", True)


def test_costs_without_a_measurement_are_paired_by_seed_and_marked() -> None:
    def run(seconds: float | None, memory: dict[str, int | None]) -> dict[str, object]:
        return {"step_seconds": seconds, "memory": memory}

    parts = {"weights": 4, "gradients": 4, "optimizer": 8, "accumulators": None, "peak": None}
    base = {1: run(1.0, parts), 2: run(2.0, parts), 3: run(None, parts)}
    mine = {s: run(2.0, {**parts, "optimizer": 16, "accumulators": 3}) for s in (1, 2, 3, 4)}
    cost = relative_cost(None, mine, base)
    assert cost.step == pytest.approx((1.5, 1.25, 1.75))
    assert (cost.memory_ratio, cost.memory_bytes, cost.accumulators, cost.in_turns) == (1.5, 24, 3, False)
    peak = relative_cost(None, {1: run(1.0, {**parts, "peak": 30})}, {1: run(1.0, {**parts, "peak": 20})})
    assert (peak.memory_ratio, peak.step) == (1.5, (1.0, 1.0, 1.0))
    nothing = relative_cost(None, {1: {}}, {1: {}})
    assert (nothing.step, nothing.memory_ratio, nothing.how) == (None, None, "")


# ---------------------------------------------------------------------- the whole summary


def test_rows_hold_what_the_runs_say() -> None:
    summary = summarise(study(ARMS))
    assert [(r.model, r.arm) for r in summary.rows] == [
        ("a", "adam"),
        ("a", "adam+mols"),
        ("a", "lion"),
        ("b", "adam"),
        ("b", "adam+mols"),
    ]
    mols = row(summary, "a", "adam+mols")
    losses = {seed: 3.9 + SEED_EFFECT[seed] - NOISE[seed] for seed in (1, 2, 3, 4, 5)}
    assert mols.losses == pytest.approx(losses)
    assert mols.mean == pytest.approx(statistics.fmean(losses.values()))
    assert mols.sd == pytest.approx(statistics.stdev(losses.values()))
    assert mols.perplexity == pytest.approx(
        [math.exp(x) for x in (statistics.fmean(losses.values()), min(losses.values()), max(losses.values()))]
    )
    assert (mols.values, mols.tried, mols.edge, mols.planned, mols.notes) == ({"lr": 2e-3}, 3, False, 5, (PASSES,))
    # The seed's effect is in both arms and drops out of the pairs, so the interval is far narrower than the sd says.
    differences = [-0.1 - 2 * NOISE[seed] for seed in (1, 2, 3, 4, 5)]
    half = 2.776445 * statistics.stdev(differences) / math.sqrt(5)
    assert mols.difference is not None
    assert mols.difference[:3] == pytest.approx((-0.1, -0.1 - half, -0.1 + half))
    assert (mols.difference.won, mols.difference.pairs, mols.difference.clear) == (5, 5, True)
    assert row(summary, "a", "adam").difference is None
    assert summary.comparisons == 3
    smallest = min(r.difference.p for r in summary.rows if r.difference and r.difference.p is not None)
    assert min(r.adjusted for r in summary.rows if r.adjusted is not None) == pytest.approx(3 * smallest)
    assert (summary.missing, summary.absent) == ([], []), "lion is not planned on b"


def test_speed_up_is_against_the_baselines_own_end() -> None:
    summary = summarise(study(ARMS))
    base = row(summary, "a", "adam")
    assert (base.reached, base.speed_up, base.speed_up_charged) == (1000, 1.0, 1.0)
    mols = row(summary, "a", "adam+mols")
    # Straight lines of slope 3 / 900 a token that end 0.1 lower: 30 tokens earlier. Two probe steps are 200 tokens.
    assert mols.reached == pytest.approx(970)
    assert mols.speed_up == pytest.approx(1000 / 970)
    assert mols.speed_up_charged == pytest.approx(1000 / (970 + 2 * TOKENS_PER_STEP))
    assert row(summary, "a", "lion").speed_up is None
    assert base.tokens == STEPS * TOKENS_PER_STEP


def test_diverged_runs_are_shown_and_never_averaged_away() -> None:
    summary = summarise(study(ARMS, diverged=[("a", "adam+mols", 2), ("b", "adam", 1)]))
    mols = row(summary, "a", "adam+mols")
    assert mols.mean == math.inf and mols.sd is None and mols.diverged == 1 and mols.speed_up is None
    assert mols.perplexity is not None and math.isfinite(mols.perplexity.low)
    assert mols.difference is not None and mols.difference.mean == math.inf and mols.difference.won == 4
    assert mols.notes == ("diverged with 1 of 5 seeds (2)", PASSES)
    other = row(summary, "b", "adam+mols")
    assert other.difference is not None and other.difference.mean == -math.inf and other.adjusted is None
    assert other.speed_up is None and other.mean is not None and math.isfinite(other.mean)
    assert summary.comparisons == 1


def test_an_unfinished_study_says_what_is_missing() -> None:
    results = study(ARMS)
    gone = StudyRun("a", "adam+mols", (("lr", 2e-3),), 4)
    del results.runs[gone]
    del results.chosen["b", "adam+mols"]
    results.missing = [gone]
    summary = summarise(results)
    assert summary.missing == [{"model": "a", "arm": "adam+mols", "values": {"lr": 2e-3}, "seed": 4}]
    assert summary.absent == [("b", "adam+mols")]
    mols = row(summary, "a", "adam+mols")
    assert (
        mols.notes == ("4 of 5 seeds were run", PASSES) and mols.difference is not None and mols.difference.pairs == 4
    )
    # Both curves are of the seeds that both have: without that, another seed's level would read as a speed-up.
    shift = statistics.fmean(-2 * NOISE[seed] for seed in (1, 2, 3, 5))
    assert mols.reached == pytest.approx(1000 - (0.1 - shift) * 300)


def test_an_arm_that_diverged_everywhere_and_one_at_the_edge() -> None:
    results = study(ARMS)
    values = (("lr", 2e-3),)
    results.chosen["a", "lion"] = Chosen(values, {values: math.inf}, False)
    results.runs = {run: r for run, r in results.runs.items() if not (run.arm == "lion" and run.seed)}
    results.chosen["b", "adam+mols"] = results.chosen["b", "adam+mols"]._replace(edge=True)
    failed = results.runs[StudyRun("b", "adam+mols", values, 1)]
    failed["report"] = {"failed": "no usable sample", "groups": {}}
    summary = summarise(results)
    lion = row(summary, "a", "lion")
    assert (lion.mean, lion.difference, lion.notes) == (None, None, ("diverged with every setting tried",))
    assert row(summary, "b", "adam+mols").notes == (
        "calibration failed in 1 of 5 runs",
        PASSES,
        "best rate at the edge of those tried",
    )


def test_alphas_by_model_and_snr() -> None:
    summary = summarise(study(ARMS))
    assert [(r.arm, r.model, r.seeds, r.clamped) for r in summary.alphas] == [
        ("adam+mols", "a", 5, ("embedding",)),
        ("adam+mols", "b", 5, ("embedding",)),
    ]
    alphas = summary.alphas[0].alphas
    assert list(alphas) == ["embedding", "qk", "vo", "other"]
    assert alphas["embedding"] == pytest.approx(
        (math.exp(statistics.fmean(math.log(4 + 0.1 * s) for s in (1, 2, 3, 4, 5))), 4.1, 4.5)
    )
    assert set(summary.snr["a"]["adam+mols"]) == {"effective", "median"}
    assert summary.snr["a"]["adam+mols"]["median"].dropped == {"embedding": 0.5, "vo": 0.5}


def test_no_baseline_and_nothing_at_all() -> None:
    results = study(ARMS)
    results.chosen = {key: value for key, value in results.chosen.items() if key[1] != "adam"}
    summary = summarise(results)
    assert [r.difference for r in summary.rows] == [None] * 3
    assert summary.absent == [("a", "adam"), ("b", "adam")] and summary.comparisons == 0
    empty = summarise(replace(results, runs={}, chosen={}))
    assert empty.rows == [] and len(empty.absent) == 5


def test_json_has_no_numbers_that_json_lacks() -> None:
    content = to_json(summarise(study(ARMS, diverged=[("a", "lion", 1)])))
    text = json.dumps(content, allow_nan=False)
    lion = next(r for r in json.loads(text)["rows"] if r["arm"] == "lion")
    assert lion["mean"] is None and lion["diverged"] == 1 and lion["losses"]["1"] is None
    assert lion["difference"]["mean"] is None and lion["cost"]["in_turns"] is False
    assert content["schema"] == 1 and content["tuning"]["a"]["lion"]["lr 0.002"] == pytest.approx(4.2)


def test_setting_text() -> None:
    assert setting_text({"lr": 0.004, "params.rank": 128, "mols.mode": "probe"}) == (
        "lr 0.004, params.rank 128, mols.mode probe"
    )
    assert mols_result("m", "x", 1e-3, 0, 2.0)["alphas"]["vo"] == 1.0


def test_pairs_that_a_study_names_are_compared_by_seed_too() -> None:
    results = study({"adam": {"small": 3.0}, "lion": {"small": 3.2}, "lion-x": {"small": 3.1}})
    results.study["pairs"] = [["lion-x", "lion"]]
    (pair,) = summarise(results).pairs
    assert (pair.model, pair.arm, pair.other) == ("small", "lion-x", "lion")
    expected = [-0.1 + 2 * NOISE[seed] for seed in (1, 2, 3, 4, 5)]
    assert pair.difference is not None and pair.difference.pairs == 5
    assert pair.difference.mean == pytest.approx(statistics.fmean(expected))
    assert summarise(results).comparisons == 2, "not among those with the baseline"


# ---------------------------------------------------------------------- questions and shares

QUESTIONS = {
    "adam": {"a": 4.0, "b": 3.0},
    "mols": {"a": 3.8, "b": 3.05},
    "constant": {"a": 3.85, "b": 2.9},
    "search": {"a": 3.75},
}
ASKED = {"primary": ["mols", "constant"], "secondary": ["mols", "adam"], "pairs": [["constant", "search"]]}


def test_holm_is_over_the_rest_where_a_study_has_a_primary_comparison() -> None:
    results = study(QUESTIONS)
    results.study |= ASKED
    summary = summarise(results)
    rest = [row(summary, "a", "constant"), row(summary, "b", "constant"), row(summary, "a", "search")]
    (pair,) = [p for p in summary.pairs if not p.question and p.difference]
    assert (pair.model, pair.arm, pair.other) == ("a", "constant", "search")
    found = [r.difference.p for r in rest if r.difference and r.difference.p is not None]
    assert pair.difference is not None and pair.difference.p is not None and len(found) == 3
    expected = holm([*found, pair.difference.p])
    assert [*(r.adjusted for r in rest), pair.adjusted] == pytest.approx(expected) and summary.comparisons == 4
    assert row(summary, "a", "mols").adjusted is None, "the secondary comparison is not adjusted"
    asked = [(p.question, p.model, p.arm, p.other) for p in summary.pairs if p.question]
    assert asked == [
        (kind, model, "mols", other)
        for kind, other in (("primary", "constant"), ("secondary", "adam"))
        for model in "ab"
    ]
    primary = summary.pairs[0].difference
    assert primary is not None and primary.mean == pytest.approx(-0.05, abs=1e-2)
    del results.study["primary"], results.study["secondary"]
    assert summarise(results).comparisons == 5, "all comparisons with the baseline, and no pair"


def test_shares_of_the_searched_gain() -> None:
    results = study(QUESTIONS)
    results.study |= {"searched": "search"}
    results.chosen["a", "search"] = results.chosen["a", "search"]._replace(spent=60)
    found = {r.arm: r for r in summarise(results).shares}
    assert set(found) == {"mols", "constant", "search"} and {r.model for r in found.values()} == {"a"}
    seen = found["mols"].share
    assert seen is not None and seen.value == pytest.approx(0.8, abs=0.02) and seen.low < seen.value < seen.high
    one = found["search"].share
    assert one is not None and (one.value, one.low, one.high) == pytest.approx((1, 1, 1))
    assert (found["mols"].tuning, found["mols"].passes) == (3, 0.2) and found["search"].tuning == 60
