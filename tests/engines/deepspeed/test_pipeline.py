"""DeepSpeed's PipelineModule: statistics and weights against the single-process reference, and a probe."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engines.deepspeed.engines import CLIP, MICROS, config
from tests.engines.deepspeed.pipeline import (
    BLOCKS,
    SETTINGS,
    UNCLIPPED,
    Reference,
    feed,
    pipeline_engine,
    pipeline_masks,
    settings_of,
)
from tests.engines.deepspeed.state import snapshot
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle import histogram, moments
from tests.helpers.oracle.adamw import ElementwiseAdamW, multipliers, ramp
from tests.helpers.oracle.sizes import VOCABULARY
from tests.helpers.oracle.statistics import gradient_sample, group_values, tokens_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

START, SAMPLES, STEPS, RAMP_END = 1, 5, 8, 7
RTOL = 1e-5  # the requirement
ATOL = 1e-5  # of weights, the requirement; they move by 1e-2

Case = tuple[bool, int, str, str]  # tied, ZeRO stage, mode, dtype
TWO: list[Case] = [(tied, stage, "probe", "float32") for tied in (False, True) for stage in (0, 1)]
TWO += [(True, 0, "online", "float32"), (False, 1, "online", "float32"), (True, 1, "moments", "float32")]
TWO += [(False, 0, "moments", "float32"), (True, 0, "probe", "bfloat16"), (True, 1, "online", "bfloat16")]
FOUR: list[Case] = [(True, 1, "probe", "float32"), (True, 0, "online", "float32"), (True, 1, "moments", "float32")]
CASES: Cases[tuple[int, Case]] = Cases(
    [*((2, case) for case in TWO), *((4, case) for case in FOUR)],
    quick=[
        (2, (True, 1, "probe", "float32")),
        (2, (False, 1, "online", "float32")),
        (2, (True, 1, "moments", "float32")),
    ],
    full=[(4, (True, 1, "moments", "float32"))],
)
EXACT = [entry for entry in CASES if entry[1][3] == "float32"]


def train(tied: bool, stage: int, mode: str, dtype: str) -> dict[str, Any]:
    """Run a user's loop over STEPS updates. Returns the engine's messages and this stage's weights."""
    section = {"mode": mode, "start": START, "samples": SAMPLES, "ramp_end": START + SAMPLES + RAMP_END}
    engine = pipeline_engine(tied, stage, dtype, {**section, "estimator": "median"})
    applied, iteration = [], 0
    while engine.global_steps < STEPS + SAMPLES * (mode != "probe"):
        before = engine.global_steps
        engine.train_batch(data_iter=feed(iteration))
        iteration += 1
        if engine.global_steps > before:
            applied.append((dict(engine.mols.multipliers), dict(engine.mols.applied_lrs)))
    outer = engine.optimizer
    result = {
        "report": engine.mols.report(),
        "alphas": {group: alpha.hex() for group, alpha in engine.mols.alphas.items()},
        "applied": applied,
        "iterations": iteration,
        "counters": (engine.global_steps, engine.micro_steps, engine.global_samples),
        "weights": {name: p.detach().float().clone() for name, p in engine.module.named_parameters()},
        "tied": sum(getattr(p, "ds_pipe_replicated", False) for p in engine.module.parameters()),
        "outer": type(outer).__name__,
        "owned": sum(piece.numel for piece in engine.mols.controller.elements.ranges),
    }
    engine.destroy()
    return result


@functools.cache
def results(world: int) -> Results:
    return run_cases(train, world, [case for ranks, case in CASES.wanted if ranks == world], timeout=120)


@functools.cache
def oracle(tied: bool, mode: str, ranks: int, clip: bool) -> dict[str, Any]:
    """Statistics of the reference on its own trajectory; mode "moments" has a trajectory only."""
    reference = Reference(tied)
    mask = pipeline_masks(reference)
    optimizer = ElementwiseAdamW(reference, mask, SETTINGS if clip else UNCLIPPED)
    samples = []
    for iteration in range(START + SAMPLES):
        sample = gradient_sample(reference, iteration, ranks, MICROS)
        if iteration >= START:
            samples.append(sample)
        if iteration < START or mode != "probe":
            before = None if tied else (optimizer.v["0.weight"] != 0).any(1)  # which tokens mode "moments" knows
            optimizer.step(sample)
            assert not clip or optimizer.norm > CLIP, "clipping must act"
    tokens = tokens_of(range(START, START + SAMPLES), ranks, MICROS, VOCABULARY)
    state = {name: (optimizer.m[name].clone(), optimizer.v[name].clone()) for name in mask}
    values = group_values(samples, mask, tokens)
    return {"values": values, "optimizer": optimizer, "reference": reference, "moments": state, "before": before}


def continued(case: Case, ranks: int, alphas: dict[str, float]) -> dict[str, Tensor]:
    """The reference's weights at the end of the same loop, with these alphas."""
    tied, stage, mode, dtype = case
    clip = settings_of(stage, dtype).clip > 0
    reference = Reference(tied)
    optimizer = ElementwiseAdamW(reference, pipeline_masks(reference), SETTINGS if clip else UNCLIPPED)
    begin, step = (START if mode == "probe" else START + SAMPLES), 0
    for iteration in range(STEPS + SAMPLES):
        if mode == "probe" and START <= iteration < START + SAMPLES:
            continue
        factor = ramp(step, begin, START + SAMPLES + RAMP_END, "linear") if step >= begin else 0.0
        optimizer.step(gradient_sample(reference, iteration, ranks, MICROS), 1.0, multipliers(alphas, factor))
        step += 1
    return {name: p.detach() for name, p in reference.named_parameters()}


def name_of(entry: tuple[int, Case]) -> str:
    world, (tied, stage, mode, dtype) = entry
    return f"{world}-{'tied' if tied else 'untied'}-{stage}-{mode}-{dtype}"


# ------------------------------------------------------------------------------------------------------------ the tests


MEASURED = [entry for entry in EXACT if entry[1][2] != "moments"]


@CASES.parametrize(("world", "case"), MEASURED, ids=name_of)
def test_statistics_equal_oracle(world: int, case: Case) -> None:
    tied, stage, mode, dtype = case
    truth = oracle(tied, mode, world // 2, settings_of(stage, dtype).clip > 0)["values"]
    for outcome in results(world)[case]:
        rows = outcome["report"]["groups"]
        assert list(rows) == list(truth) and ("head" in rows) != tied
        for group, values in truth.items():
            assert rows[group]["elements"] == values.elements
            assert rows[group]["never_moved_share"] == values.never_moved / values.elements
            assert rows[group]["unseen_share"] == values.unseen / values.elements
            for key, estimator in (("snr_mean", "mean"), ("snr_pooled", "pooled"), ("damping", "damping")):
                assert rows[group][key] == pytest.approx(values.estimate(estimator, corrected=False), rel=RTOL)
            low, high = histogram.median_bounds(values.snr, RTOL)
            assert low <= rows[group]["snr_median"] <= high
        assert outcome["report"]["world"] == {"data": world // 2, "tensor": 1, "pipeline": 2, "expert": 1}


@CASES.parametrize(("world", "case"), ids=name_of)
def test_every_stage_has_the_same_alphas_and_rates(world: int, case: Case) -> None:
    outcomes = results(world)[case]
    assert len(set(outcomes[0]["alphas"].values())) > 2
    for outcome in outcomes:
        assert outcome["alphas"] == outcomes[0]["alphas"]
        assert outcome["report"] == outcomes[0]["report"]
        assert outcome["applied"] == outcomes[0]["applied"]
        assert outcome["applied"][-1][0].keys() == outcome["applied"][-1][1].keys() == outcome["alphas"].keys()
        # micro_steps: PipelineEngine does not count them
        assert outcome["counters"] == (outcome["counters"][0], 0, outcome["counters"][0] * 2 * MICROS * (world // 2))
        assert outcome["iterations"] == STEPS + SAMPLES


@CASES.parametrize(("world", "case"), EXACT, ids=name_of)
def test_weights_equal_per_element_adamw(world: int, case: Case) -> None:
    outcomes = results(world)[case]
    alphas = {group: float.fromhex(alpha) for group, alpha in outcomes[0]["alphas"].items()}
    truth, start = continued(case, world // 2, alphas), Reference(case[0]).state_dict()
    seen = set()
    for outcome in outcomes:
        for name, weight in outcome["weights"].items():
            assert float((weight - truth[name]).abs().max()) <= ATOL, name
            assert float((weight - start[name]).abs().max()) > 100 * ATOL, f"{name} did not move"
            seen.add(name)
    assert seen == truth.keys()


@CASES.parametrize("case", [case for case in TWO if case[2] == "moments"], reads=lambda case: [(2, case)], ids=str)
def test_moments_equal_adams_own(case: Case) -> None:
    """Statistics of the reference's m and v, as METHOD has them."""
    tied, stage, mode, dtype = case
    truth = oracle(tied, mode, 1, settings_of(stage, dtype).clip > 0)
    optimizer = truth["optimizer"]
    betas = (optimizer.settings.beta1, optimizer.settings.beta2)
    tokens = truth["before"]
    values = moments.moment_values(truth["moments"], pipeline_masks(truth["reference"]), optimizer.steps, betas, tokens)
    for outcome in results(2)[case]:
        moments.check_rows(outcome["report"]["groups"], values)


@CASES.parametrize("case", TWO, reads=lambda case: [(2, case)], ids=str)
def test_the_cases_are_what_they_say(case: Case) -> None:
    outcomes = results(2)[case]
    tied = [outcome["tied"] for outcome in outcomes]
    assert tied == ([0, 1] if case[0] else [0, 0])
    assert {outcome["outer"] for outcome in outcomes} == {
        "BF16_Optimizer" if case[3] == "bfloat16" and case[1] == 0 else
        "AdamW" if case[1] == 0 else "DeepSpeedZeroOptimizer"
    }  # fmt: skip
    total = sum(p.numel() for p in Reference(case[0]).parameters())
    assert sum(outcome["owned"] for outcome in outcomes) == total


# --------------------------------------------------------------------------------------- a probe window leaves no trace


def probe(stage: int, dtype: str, probing: bool) -> list[dict[str, str]]:
    """Digests of this stage after each update, with dropout seeded by layer and number of forward passes."""
    section = {"samples": 4, "start": 1, "ramp_end": 3, "alpha_min": 1.0, "alpha_max": 1.0}
    engine = pipeline_engine(True, stage, dtype, section if probing else None, dropout=0.1)
    module = engine.module
    module.register_buffer("passes", torch.zeros(()))
    module.register_forward_hook(lambda *_: setattr(module, "passes", module.passes + 1))
    torch.manual_seed(7)
    prints: list[dict[str, str]] = []
    windows = 0
    while engine.global_steps < 4:
        before, step, passes = snapshot(engine), engine.global_steps, float(module.passes)
        window = probing and engine.mols.phase == "calibrating"
        engine.train_batch(data_iter=feed(500 + windows if window else step))
        windows += window
        if not window:
            counts = str((module.micro_offset, float(module.passes)))
            prints.append({**snapshot(engine), "forward passes": counts})
            assert float(module.passes) > passes
            continue
        after = snapshot(engine)
        assert [key for key in before if before[key] != after[key]] == [] and float(module.passes) == passes
    assert windows == (4 if probing else 0)
    engine.destroy()
    return prints


PROBES = Cases([(0, "float32"), (0, "bfloat16"), (1, "float32"), (1, "bfloat16")], quick=[(1, "float32")])


@functools.cache
def probes() -> Results:
    return run_cases(probe, 2, [(*case, probing) for case in PROBES.wanted for probing in (False, True)], timeout=90)


@PROBES.parametrize("case", ids=str)
def test_probe_leaves_no_trace(case: tuple[int, str]) -> None:
    for stock, probed in zip(probes()[*case, False], probes()[*case, True], strict=True):
        assert len(stock) == 4 and stock == probed


# ----------------------------------------------------------------------------------------- names, refusals, checkpoints


def say(what: str) -> tuple[str, str]:
    """Message of attaching to an unsupported engine, or to one that needs a rule."""
    import mols_ds
    from mols_ds.errors import MolsError

    section: dict[str, Any] = {"start": 1, "samples": 4, "ramp_end": 3, "total_steps": 10}
    if what == "sliced":
        return attach_sliced(section)
    if what == "ruled":
        section["rules"] = [["^0\\.weight$", "embedding"], [f"^{BLOCKS + 2}\\.", "head"]]
    engine = pipeline_engine(False, 1, "float32", None, rules=what in ("nameless", "ruled"))
    if what == "unknown rule":
        section["rules"] = [["no_such_layer", "mlp"]]
    try:
        mols = mols_ds.attach(engine, section)
    except MolsError as error:
        return type(error).__name__, str(error)
    finally:
        engine.destroy()
    return "table", ", ".join(row.group for row in mols.controller.table)


def attach_sliced(section: dict[str, Any]) -> tuple[str, str]:
    """A topology whose ranks have slices of the layers' tensors."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    import mols_ds
    from mols_ds.errors import MolsError

    topology = PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)
    module = PipelineModule(layers=[nn.Linear(8, 8), nn.Linear(8, 4)], topology=topology, loss_fn=nn.MSELoss())
    optimizer = torch.optim.AdamW(module.parameters())
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config(0))[0]
    try:
        mols_ds.attach(engine, section)
    except MolsError as error:
        return type(error).__name__, str(error)
    return "table", ""


@functools.cache
def said() -> Results:
    return run_cases(say, 2, [("nameless",), ("ruled",), ("unknown rule",), ("sliced",)], timeout=60)


@pytest.mark.tier("all")
def test_a_nameless_embedding_needs_a_rule() -> None:
    for kind, message in said()["nameless",]:
        assert kind == "MolsConfigError" and "'N.weight' of shape [97, 24]" in message and '"rules"' in message
    assert said()["ruled",] == [("table", "embedding, head, qk, vo, mlp, other")] * 2


@pytest.mark.tier("all")
def test_a_rule_that_matches_no_stage_is_refused_on_every_stage() -> None:
    for kind, message in said()["unknown rule",]:
        assert kind == "MolsConfigError" and "no_such_layer" in message and "matches no trainable parameter" in message


@pytest.mark.tier("all")
def test_a_sliced_topology_is_refused() -> None:
    for kind, message in said()["sliced",]:
        assert kind == "MolsUnsupportedError" and "topology has tensor slicing (axis 'model')" in message


def resume(folder: str, part: str) -> dict[str, Any]:
    """Half a calibration, saved; or the other half, resumed; or both in one."""
    engine = pipeline_engine(True, 1, "float32", {"start": 1, "samples": 6, "ramp_end": 4})
    iteration = 0
    if part == "second":
        engine.load_checkpoint(folder, tag="half")
        iteration = 4
        assert engine.mols.samples == 3
    while iteration < (4 if part == "first" else 10):
        engine.train_batch(data_iter=feed(iteration))
        iteration += 1
    if part == "first":
        engine.save_checkpoint(folder, tag="half")
    result = {"weights": snapshot(engine), "alphas": engine.mols.alphas, "phase": engine.mols.phase}
    result["weights"].pop("random")
    engine.destroy()
    return result


@pytest.mark.tier("all")
def test_resume_in_the_middle_of_a_probe_window(tmp_path: Any) -> None:
    found = run_cases(resume, 2, [(str(tmp_path), part) for part in ("first", "second", "whole")], timeout=90)
    assert sorted(p.name for p in (tmp_path / "half").glob("mols_rank_*")) == [
        f"mols_rank_0000{rank}_of_00002.pt" for rank in (0, 1)
    ]
    for resumed, whole in zip(found[str(tmp_path), "second"], found[str(tmp_path), "whole"], strict=True):
        assert resumed == whole and whole["phase"] == "fixed"
