"""DeepSpeed's engine with a tensor-parallel Megatron-core model, and with AutoTP, against single-process references."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.deepspeed.engines import MICROS, config, engine_of
from tests.engines.deepspeed.models import model_of
from tests.engines.deepspeed.state import full_weights
from tests.engines.megatron.building import SEQUENCES, Setup, tokens
from tests.engines.megatron.grids import Plan
from tests.engines.megatron.oracle import Truth, rate, reference
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle import histogram, moments
from tests.helpers.oracle.models import batch, groups_of, loss_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

RTOL = 1e-5  # the requirement
ATOL = 1e-5  # of weights, the requirement; the largest movement of each weight is far above it
UPDATES = 10
CLIP = 0.2  # below the gradient norm, so that clipping always acts
SHAPES = {
    "gqa": Setup(clip=CLIP, micro_batches=4),
    "tied": Setup(tied=True, bias=True, kv_groups=4, clip=CLIP, micro_batches=4),
}

Case = tuple[str, int, int, str]  # model, tensor-parallel size, ZeRO stage, mode
TWO: list[Case] = [("gqa", 2, stage, "probe") for stage in (0, 1, 2, 3)]
TWO += [("tied", 2, 0, "online"), ("gqa", 2, 1, "online"), ("tied", 2, 2, "online"), ("gqa", 2, 3, "online")]
TWO += [("gqa", 2, 0, "moments"), ("tied", 2, 3, "moments"), ("gqa", 1, 2, "probe")]
FOUR: list[Case] = [("gqa", 2, 0, "probe"), ("tied", 2, 2, "probe"), ("gqa", 2, 3, "online"), ("gqa", 2, 1, "moments")]
CASES = Cases(
    [*((2, case) for case in TWO), *((4, case) for case in FOUR)],
    quick=[(2, ("gqa", 2, 3, "probe")), (2, ("gqa", 2, 0, "moments")), (2, ("gqa", 2, 1, "online"))],
    full=[
        *((2, ("gqa", 2, 2, "probe")), (2, ("gqa", 2, 3, "online"))),
        *((4, ("tied", 2, 2, "probe")), (4, ("gqa", 2, 3, "online")), (4, ("gqa", 2, 1, "moments"))),
    ],
)


def plan_of(mode: str) -> Plan:
    estimator = "damping" if mode == "moments" else "mean"
    return Plan(mode=mode, estimator=estimator, start=2, samples=5, ramp_end=9, updates=UPDATES, warmup=3)


def section_of(plan: Plan) -> dict[str, Any]:
    section = {"mode": plan.mode, "start": plan.start, "samples": plan.samples, "ramp_end": plan.ramp_end}
    section |= {"estimator": plan.estimator, "noise_floor_correction": plan.corrected, "reference": "vo"}
    return section | {"alpha_min": plan.low, "alpha_max": plan.high}


# ------------------------------------------------------------------------------------------------------------ the ranks


def setup_of(model: str, tensor: int) -> Setup:
    return dataclasses.replace(SHAPES[model], tp=tensor)


def build(setup: Setup, stage: int, mols: dict[str, Any] | None, plan: Plan, **arguments: Any) -> Any:
    """An engine for this rank's part of the model; inside `cpu_megatron()`."""
    import deepspeed
    from megatron.core import parallel_state

    from megatron_patches.mpu import DeepSpeedMpu
    from tests.engines.megatron.building import stage_model, start, transformer_config
    from tests.engines.megatron.weights import fill

    start(setup)
    model = stage_model(setup, transformer_config(setup), True, True)()
    fill([model], setup)
    optimizer = torch.optim.AdamW(
        groups_of(model, setup.lr, setup.lr, setup.weight_decay), betas=(0.9, 0.95), eps=plan.eps
    )
    settings = config(
        stage,
        None if mols is None else {**mols, "total_steps": plan.updates},
        micros=setup.micro_batches // parallel_state.get_data_parallel_world_size(),
        gradient_clipping=setup.clip,
    )
    return engine_of(
        settings,
        model,
        optimizer,
        initialize=deepspeed.initialize if mols is None else None,
        schedule=lambda update: rate(setup, plan, update) / setup.lr,
        **{"mpu": DeepSpeedMpu(), **arguments},
    )


def feed(setup: Setup, iteration: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, positions, mask) of this data-parallel rank's micro-batches, as if cards were dealt."""
    from megatron.core import parallel_state

    positions = torch.arange(setup.seq)[None].expand(SEQUENCES, -1)
    masked = torch.triu(torch.ones(1, 1, setup.seq, setup.seq, dtype=torch.bool), 1)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for number in range(rank, setup.micro_batches, ranks):
        yield tokens(setup, iteration, number), positions, masked


def go(engine: Any, setup: Setup, iteration: int) -> None:
    for ids, positions, masked in feed(setup, iteration):
        engine.backward(engine(ids, positions, masked, labels=ids.roll(-1, 1)).float().mean())
        engine.step()


def local_weights(engine: Any) -> dict[str, tuple[Tensor, tuple[int, int], int]]:
    """Logical name -> this rank's whole part, (tensor rank, size) that cut it, and the dimension."""
    from tests.engines.megatron.weights import tensor_rank

    weights = full_weights(engine)
    return {
        name: (weights[name], tensor_rank(name, p), int(getattr(p, "partition_dim", 0)))
        for name, p in engine.module.named_parameters()
    }


def train(model: str, tensor: int, stage: int, mode: str) -> dict[str, Any]:
    from megatron_patches.cpu.emulation import cpu_megatron

    setup, plan = setup_of(model, tensor), plan_of(mode)
    with cpu_megatron():
        engine = build(setup, stage, section_of(plan), plan)
        applied = []
        for iteration in range(plan.passes):
            step = engine.global_steps
            go(engine, setup, iteration)
            if engine.global_steps > step:
                applied.append((dict(engine.mols.multipliers), dict(engine.mols.applied_lrs)))
        result = {
            "report": engine.mols.report(),
            "alphas": {group: alpha.hex() for group, alpha in engine.mols.alphas.items()},
            "applied": applied,
            "steps": engine.global_steps,
            "micro_steps": engine.micro_steps,
            "weights": local_weights(engine),
            "owned": sum(piece.numel for piece in engine.mols.controller.elements.ranges),
            "norm": float(engine.get_global_grad_norm() or 0.0),
        }
        engine.destroy()
    return result


@functools.cache
def results(world: int) -> Results:
    return run_cases(train, world, [case for ranks, case in CASES.wanted if ranks == world], timeout=150)


@functools.cache
def references() -> Results:
    models = {(case[0], case[3]) for _, case in CASES.wanted}
    return run_cases(reference, 1, [(SHAPES[model], plan_of(mode)) for model, mode in sorted(models)], timeout=150)


def truth_of(case: Case) -> Truth:
    return references()[SHAPES[case[0]], plan_of(case[3])][0]


def name_of(entry: tuple[int, Case]) -> str:
    world, (model, tensor, stage, mode) = entry
    return f"{world}-{model}-tp{tensor}-zero{stage}-{mode}"


# ------------------------------------------------------------------------------------------------------------ the tests


@CASES.parametrize(("world", "case"), ids=name_of)
def test_statistics_equal_oracle(world: int, case: Case) -> None:
    truth = truth_of(case)
    for outcome in results(world)[case]:
        rows = outcome["report"]["groups"]
        assert outcome["report"]["world"] == {"data": world // case[1], "tensor": case[1], "pipeline": 1, "expert": 1}
        if case[3] == "moments":
            moments.check_rows(rows, truth.values)
            continue
        assert list(rows) == list(truth.values)
        for group, values in truth.values.items():
            assert rows[group]["elements"] == values.elements
            for key, estimator in (("snr_mean", "mean"), ("snr_pooled", "pooled"), ("damping", "damping")):
                assert rows[group][key] == pytest.approx(values.estimate(estimator, corrected=False), rel=RTOL), group
            low, high = histogram.median_bounds(values.snr, RTOL)
            assert low <= rows[group]["snr_median"] <= high


@CASES.parametrize(("world", "case"), ids=name_of)
def test_alphas_have_the_same_bits_on_every_rank(world: int, case: Case) -> None:
    outcomes, truth = results(world)[case], truth_of(case)
    for outcome in outcomes:
        for key in ("alphas", "report", "applied", "steps", "micro_steps"):
            assert outcome[key] == outcomes[0][key], key
        assert outcome["steps"] == UPDATES
        assert outcome["micro_steps"] == UPDATES * SHAPES[case[0]].micro_batches * case[1] // world
        alphas = {group: float.fromhex(alpha) for group, alpha in outcome["alphas"].items()}
        assert len(set(alphas.values())) > 2 and alphas.keys() == truth.alphas.keys()
        if case[3] != "moments":
            assert alphas == pytest.approx(truth.alphas, rel=RTOL)
            continue
        for group, (low, high) in moments.alpha_bounds(truth.values, plan_of(case[3]).estimator, "vo").items():
            assert low <= alphas[group] <= high, group


@CASES.parametrize(("world", "case"), ids=name_of)
def test_weights_equal_per_element_adamw(world: int, case: Case) -> None:
    from tests.engines.megatron.weights import slice_of

    truth = truth_of(case)
    assert min(truth.norms) > CLIP, "clipping must act"
    for outcome in results(world)[case]:
        assert outcome["weights"].keys() == truth.weights.keys()
        for name, (weight, (rank, size), dim) in outcome["weights"].items():
            expected = slice_of(name, truth.weights[name], rank, size, dim)
            assert float((weight - expected).abs().max()) <= ATOL, name
            assert float((truth.weights[name] - truth.initial[name]).abs().max()) > 50 * ATOL, name


@CASES.parametrize(("world", "case"), ids=name_of)
def test_the_cases_are_what_they_say(world: int, case: Case) -> None:
    """Parameters are cut and copied, every logical element is owned once, fused rows are cut by the ranks."""
    outcomes = results(world)[case]
    total = sum(w.numel() for w in truth_of(case).weights.values())
    assert sum(outcome["owned"] for outcome in outcomes) == total
    sizes = {name: size for name, (_, (_, size), _) in outcomes[0]["weights"].items()}
    assert sizes["decoder.layers.0.self_attention.linear_qkv.weight"] == case[1]
    assert sizes["decoder.final_layernorm.weight"] == 1
    cuts = {outcome["weights"]["embedding.word_embeddings.weight"][1] for outcome in outcomes}
    assert cuts == {(rank, case[1]) for rank in range(case[1])}


# ----------------------------------------------------------------------------------------------------- checkpoints


def resume(folder: str, part: str) -> dict[str, Any]:
    """Half a calibration, saved; or the other half, resumed; or both in one."""
    from megatron_patches.cpu.emulation import cpu_megatron

    setup, plan = setup_of("gqa", 2), plan_of("probe")
    with cpu_megatron():
        engine = build(setup, 2, section_of(plan), plan)
        iteration = 0
        if part == "second":
            engine.load_checkpoint(folder, tag="half")
            iteration = plan.start + 3
            assert engine.mols.samples == 3
        while iteration < (plan.start + 3 if part == "first" else plan.passes):
            go(engine, setup, iteration)
            iteration += 1
        if part == "first":
            engine.save_checkpoint(folder, tag="half")
        result = {name: weight.numpy().tobytes() for name, (weight, _, _) in local_weights(engine).items()}
        alphas = engine.mols.alphas
        engine.destroy()
    return {"weights": result, "alphas": alphas}


@pytest.mark.tier("all")
def test_resume_in_the_middle_of_a_probe_window(tmp_path: Any) -> None:
    found = run_cases(resume, 2, [(str(tmp_path), part) for part in ("first", "second", "whole")], timeout=120)
    files = sorted(path.name for path in (tmp_path / "half").glob("mols_rank_*"))
    assert files == [f"mols_rank_0000{rank}_of_00002.pt" for rank in (0, 1)]  # by global rank: both are data rank 0
    for resumed, whole in zip(found[str(tmp_path), "second"], found[str(tmp_path), "whole"], strict=True):
        assert resumed == whole and whole["alphas"]


# ---------------------------------------------------------------------------------------------------------- AutoTP

AUTO = Cases(
    [("llama", 0, "online"), ("llama", 1, "probe"), ("qwen2", 2, "probe"), ("qwen2", 3, "probe")],
    quick=[("qwen2", 2, "probe")],
)


def train_auto(model: str, stage: int, mode: str) -> dict[str, Any]:
    """A transformers model that DeepSpeed cuts by itself; both ranks see the same batches."""
    section = {"mode": mode, "start": 0, "samples": 5, "ramp_end": 20, "total_steps": 50}
    whole = model_of(model)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.0, weight_decay=0.0)  # at fixed weights: online is probe
    engine = engine_of(config(stage, section, tensor_parallel={"autotp_size": 2}), whole, optimizer)
    for iteration in range(5):
        for micro in range(MICROS):
            engine.backward(loss_of(engine, batch(iteration, micro, 0)))
            engine.step()
    cut = sum(bool(getattr(p, "tensor_model_parallel", False)) for p in engine.module.parameters())
    result = {"report": engine.mols.report(), "alphas": engine.mols.alphas, "cut": cut}
    engine.destroy()
    return result


@functools.cache
def auto() -> Results:
    return run_cases(train_auto, 2, AUTO.wanted, timeout=120)


@AUTO.parametrize("case", ids=str)
def test_autotp_statistics_equal_oracle(case: tuple[str, int, str]) -> None:
    from tests.helpers.oracle.models import build, masks
    from tests.helpers.oracle.sizes import VOCABULARY
    from tests.helpers.oracle.statistics import gradient_sample, group_values, tokens_of

    whole = build(case[0])
    tokens = tokens_of(range(5), 1, 2, VOCABULARY)
    truth = group_values([gradient_sample(whole, i, 1, 2) for i in range(5)], masks(case[0], whole), tokens)
    outcomes = auto()[case]
    for outcome in outcomes:
        assert outcome["cut"] > 10
        assert outcome["alphas"] == outcomes[0]["alphas"]
        rows = outcome["report"]["groups"]
        assert list(rows) == list(truth)
        for group, values in truth.items():
            assert rows[group]["elements"] == values.elements
            for key, estimator in (("snr_mean", "mean"), ("snr_pooled", "pooled"), ("damping", "damping")):
                assert rows[group][key] == pytest.approx(values.estimate(estimator, corrected=False), rel=RTOL), group


# ---------------------------------------------------------------------------------------------- refused, by name


def refuse(what: str) -> str:
    import deepspeed

    import mols_ds
    from megatron_patches.cpu.emulation import cpu_megatron
    from mols_ds.errors import MolsError

    setups = {"no mpu": Setup(tp=2), "sequence parallel": Setup(tp=2, sp=True), "qk norm": Setup(tp=2, qk_norm=True)}
    setups |= {"foreign": Setup(tp=2), "pipeline": Setup(pp=2), "experts": Setup(ep=2, experts=2)}
    plan = plan_of("probe")
    with cpu_megatron():
        from tests.engines.megatron.building import start

        try:
            if what == "no grid":
                from megatron_patches.mpu import DeepSpeedMpu

                DeepSpeedMpu()
            elif what in ("pipeline", "experts"):
                from megatron_patches.mpu import DeepSpeedMpu

                start(setups[what])
                DeepSpeedMpu()
            elif what == "foreign":
                from megatron_patches.mpu import DeepSpeedMpu

                start(setups[what])
                model = model_of()
                optimizer = torch.optim.AdamW(model.parameters())
                settings = config(1, micros=1)
                engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=DeepSpeedMpu())[0]
                mols_ds.attach(engine, section_of(plan))
            else:
                more = {"mpu": None} if what == "no mpu" else {}
                engine = build(setups[what], 1, None, plan, **more)
                mols_ds.attach(engine, section_of(plan))
        except MolsError as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


REFUSED = {
    "no grid": r"parallel_state is not initialised: call parallel_state.initialize_model_parallel",
    "no mpu": r"split over 2 tensor-parallel ranks in an engine that does not know it: pass mpu=",
    "sequence parallel": r"sequence parallelism \(.*\), whose norms' gradients .*: set sequence_parallel=False",
    "qk norm": r"qk_layernorm with tensor parallelism, .*: set qk_layernorm=False",
    "foreign": r"tensor parallelism \(mpu of size 2\) of a model that is neither Megatron-core's nor split by AutoTP",
    "pipeline": r"cannot run a Megatron model with pipeline_model_parallel_size 2: use 1, or train with Megatron's own",
    "experts": r"cannot run a Megatron model with expert_model_parallel_size 2",
}


@functools.cache
def refused() -> Results:
    return run_cases(refuse, 2, [(what,) for what in REFUSED], timeout=90)


@pytest.mark.tier("all")
@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str) -> None:
    for said in refused()[what,]:
        assert said.startswith("MolsUnsupportedError: "), said
        assert re.search(REFUSED[what], said), said
