"""A run that is resumed with another number of ranks: stage 0 as it is, stages 1-3 through a universal checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mols_ds.errors import MolsUnsupportedError
from tests.harness import Results, run_cases
from tests.zero.resume import (
    DECAY,
    SAMPLES,
    caught,
    engine_of,
    full_weights,
    inner_optimizer,
    iterate,
    section,
    until,
)

SAVING_WORLD, LOADING_WORLDS = 2, (1, 3)
ENGINES = [(0, "fp32"), (1, "fp32"), (1, "bf16 fp32 gradients"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
HALF, FOLLOWED = 3, 3
RAMP_END = 8  # the ramp goes on for some steps after the calibration, in each mode
TAGS = {"half": "probe", "ramping": "probe", "fixed": "probe", "moments": "moments"}
ROBIN = "robin"


def _mols(mode: str) -> dict[str, Any]:
    return section(mode, ramp_end=RAMP_END if mode == "probe" else 15)


def _place(base: str, stage: int, dtype: str) -> str:
    return str(Path(base, f"{stage}-{dtype}".replace(" ", "-")))


def convert(folder: str, tag: str) -> None:
    """DeepSpeed's converter, as its command line calls it; on rank 0."""
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        arguments = {
            "input_folder": str(Path(folder, tag)),
            "output_folder": str(Path(folder, f"{tag}_universal")),
            "num_extract_workers": 1,
            "num_merge_workers": 1,
            "keep_temp_folder": False,
            "strict": True,
            "inject_missing_state": True,
        }
        ds_to_universal.main(argparse.Namespace(**arguments))
    dist.barrier()


def state_of(engine: Any) -> dict[str, Any]:
    """What must be the same on any number of ranks."""
    inner = inner_optimizer(engine)
    return {
        "weights": full_weights(engine),
        "alphas": engine.mols.alphas,
        "options": [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups],
        "step": engine.global_steps,
        "counters": {int(values["step"]) for values in inner.state.values()},
        "apart": len({_place_of(values["step"]) for values in inner.state.values()}) == len(inner.state),
    }


def _place_of(counter: Tensor | int) -> int:
    return counter.data_ptr() if isinstance(counter, Tensor) else id(object())


def follow(engine: Any, iteration: int) -> dict[int, Any]:
    """step -> (multipliers, applied rates, phase after it, the optimizer's counters) of the next optimizer steps."""
    found = {}
    for later in range(iteration, iteration + FOLLOWED):
        iterate(engine, later)
        counters = {int(values["step"]) for values in inner_optimizer(engine).state.values()}
        mols = engine.mols
        found[engine.global_steps] = (mols.multipliers, mols.applied_lrs, mols.phase, counters)
    return found


def save(base: str, stage: int, dtype: str) -> dict[str, Any]:
    """On each rank of the saving run: tag -> state, and what the uninterrupted run does next."""
    if dtype == ROBIN:
        engine = engine_of(stage, _mols("probe"), zero={"round_robin_gradients": True})
        iterate(engine, 0)
        engine.save_checkpoint(_place(base, stage, dtype), tag=ROBIN)
        convert(_place(base, stage, dtype), ROBIN)
        engine.destroy()
        return {}
    folder, found = _place(base, stage, dtype), {}
    for mode in ("probe", "moments"):
        engine = engine_of(stage, _mols(mode), dtype=dtype)
        iteration = 0
        for tag in (tag for tag, its_mode in TAGS.items() if its_mode == mode):
            iteration = until(engine, iteration, lambda mols, tag=tag: _reached(mols, tag))
            if tag == "ramping":
                iterate(engine, iteration)
                iteration += 1
            engine.save_checkpoint(folder, tag=tag, client_state={"iteration": iteration})
            found[tag] = state_of(engine)
            if stage > 0:
                convert(folder, tag)
            if tag in ("ramping", "fixed"):
                found[tag]["next"] = follow(engine, iteration)
                iteration += FOLLOWED
        engine.destroy()
    return found


def _reached(mols: Any, tag: str) -> bool:
    if tag in ("half", "moments"):
        return bool(mols.phase == "calibrating" and mols.samples == HALF)
    return bool(mols.phase == tag)


def load(base: str, stage: int, dtype: str) -> dict[str, Any]:
    """On each rank of a run with another number of ranks."""
    if dtype == ROBIN:
        engine = engine_of(stage, _mols("probe"), universal=True)
        with pytest.raises(MolsUnsupportedError) as error:
            engine.load_checkpoint(_place(base, stage, dtype), tag=f"{ROBIN}_universal")
        engine.destroy()
        return {"error": str(error.value)}
    folder, found = _place(base, stage, dtype), {}
    for tag, mode in TAGS.items():
        engine = engine_of(stage, _mols(mode), dtype=dtype, universal=stage > 0)
        with caught() as warned:
            path, client_state = engine.load_checkpoint(folder, tag=f"{tag}_universal" if stage else tag)
        assert path is not None and "mols" not in client_state
        found[tag] = state_of(engine) | {"warned": warned, "phase": engine.mols.phase, "samples": engine.mols.samples}
        iteration = client_state["iteration"]
        if tag in ("half", "moments"):
            until(engine, iteration, lambda mols: mols.phase in ("ramping", "fixed"))
            found[tag]["end"] = (engine.mols.samples, engine.mols.accumulator_bytes, engine.mols.alphas)
        else:
            found[tag]["next"] = follow(engine, iteration)
        engine.destroy()
    return found


Outcome = tuple[dict[tuple[int, str], list[Any]], Mapping[int, Results], str]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the saving run knew, what the loading runs of each size found, and the folder between them."""
    base = str(tmp_path_factory.mktemp("universal"))
    cases = [(base, stage, dtype) for stage, dtype in [*ENGINES, (1, ROBIN)]]
    saved = run_cases(save, SAVING_WORLD, cases, timeout=60)
    loaded = {world: run_cases(load, world, cases, timeout=60) for world in LOADING_WORLDS}
    return {(stage, dtype): saved[base, stage, dtype] for stage, dtype in ENGINES}, loaded, base


@pytest.mark.parametrize("world", LOADING_WORLDS)
@pytest.mark.parametrize(("stage", "dtype"), ENGINES)
def test_alphas_continue_with_the_same_values(outcomes: Outcome, stage: int, dtype: str, world: int) -> None:
    saved, loaded, base = outcomes
    for found in loaded[world][base, stage, dtype]:
        for tag in ("ramping", "fixed"):
            truth, seen = saved[stage, dtype][0][tag], found[tag]
            assert len(set(truth["alphas"].values())) > 2
            for key in ("weights", "alphas", "options", "step", "counters"):
                assert seen[key] == truth[key], (tag, key)
            assert [options["weight_decay"] for options in seen["options"]] == [DECAY, 0.0]
            assert seen["options"][0]["lr"] < seen["options"][1]["lr"]
            assert seen["apart"], "a step counter that several shards share counts each of them"
            assert seen["next"] == truth["next"]
            assert (seen["phase"], seen["samples"], seen["warned"]) == (tag, SAMPLES, [])
        assert any(value[2] == "ramping" for value in found["ramping"]["next"].values())


@pytest.mark.parametrize("world", LOADING_WORLDS)
@pytest.mark.parametrize(("stage", "dtype"), ENGINES)
def test_a_half_done_calibration_starts_over_and_says_so(outcomes: Outcome, stage: int, dtype: str, world: int) -> None:
    saved, loaded, base = outcomes
    ranks = loaded[world][base, stage, dtype]
    for rank, found in enumerate(ranks):
        half, moments = found["half"], found["moments"]
        assert (half["phase"], half["samples"]) == ("calibrating", 0)
        assert half["weights"] == saved[stage, dtype][0]["half"]["weights"]
        assert half["end"][:2] == (SAMPLES, 0) and half["end"] == ranks[0]["half"]["end"]
        if rank == 0:
            assert len(half["warned"]) == 1
            assert "cannot be continued" in half["warned"][0] and "starts over" in half["warned"][0]
        # Mode "moments" has no other state than the optimizer's, which is there
        assert (moments["phase"], moments["samples"], moments["warned"]) == ("calibrating", HALF, [])
        assert moments["end"][0] == SAMPLES and len(set(moments["end"][2].values())) > 2


@pytest.mark.parametrize("world", LOADING_WORLDS)
def test_round_robin_of_the_saving_run_is_refused(outcomes: Outcome, world: int) -> None:
    _, loaded, base = outcomes
    for found in loaded[world][base, 1, ROBIN]:
        assert "round_robin_gradients in the run that saved it" in found["error"]
        assert torch.tensor(len(found["error"].splitlines())) == 1
