"""Checkpoints that move to another number of ranks, ZeRO stage, offload or way in; what cannot move is refused.

Stage 0 moves as it is, stages 1 to 3 through a universal checkpoint. docs/checkpoints.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.engines.deepspeed.moves import HALF, SAMPLES, STATES, TAGS, Run, work
from tests.engines.deepspeed.resume import DECAY
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

SAVING_WORLD = 2
ATOL = 1e-6  # of fp32 weights after three steps of at most 0.06: sums in another order, some units in the last place
ALPHA_RTOL = 1e-4  # of alphas measured again on other ranks: variances of few samples cancel digits
EVERY = tuple(TAGS)

PLAIN, ONE, TWO, THREE = Run(0), Run(1), Run(2), Run(3)
HELD = Run(2, offload="optimizer", way="attach")
SPILLED = Run(3, offload="all")
BF16, BF16_TWO, BF16_FP32 = Run(3, "bf16"), Run(2, "bf16", granularity="layer_type"), Run(1, "bf16 fp32 grads")
LAYERS = Run(1, granularity="layer_type")
MOMENTS, MOMENTS_THREE = Run(1, mode="moments"), Run(3, mode="moments")
STOCK, STOCK_THREE = Run(1, way="stock"), Run(3, way="stock")

SOURCES: dict[Run, tuple[str, ...]] = {
    **dict.fromkeys((ONE, THREE), EVERY),
    **dict.fromkeys((PLAIN, HELD, BF16, BF16_FP32), ("half", "ramping")),
    **dict.fromkeys((LAYERS, BF16_TWO, STOCK), ("ramping",)),
    **dict.fromkeys((MOMENTS, MOMENTS_THREE), ("half",)),
}
Move = tuple[Run, Run, tuple[str, ...]]
MOVES: dict[int, list[Move]] = {  # ranks that load -> source, target, tags
    1: [
        *((PLAIN, PLAIN, ("half", "ramping")), (ONE, SPILLED, EVERY), (THREE, HELD, EVERY), (HELD, ONE, ("ramping",))),
        *((BF16, BF16, ("half", "ramping")), (BF16_FP32, BF16, ("ramping",)), (MOMENTS, MOMENTS_THREE, ("half",))),
        *((ONE, ONE, ("fixed",)), (THREE, THREE, ("fixed",)), (LAYERS, LAYERS._replace(stage=3), ("ramping",))),
    ],
    2: [(ONE, TWO._replace(way="stock"), ("fixed",)), (THREE, STOCK_THREE, ("fixed",)), (STOCK, THREE, ("ramping",))],
    3: [
        *(
            (PLAIN, PLAIN, ("ramping",)),
            (ONE, TWO, ("waiting", "half", "ramping")),
            (THREE, THREE, ("half", "ramping")),
        ),
        *((HELD, HELD, ("ramping",)), (BF16_FP32, BF16_FP32, ("half", "ramping")), (STOCK, TWO, ("ramping",))),
        *((MOMENTS_THREE, MOMENTS, ("half",)), (LAYERS, LAYERS, ("ramping",))),
    ],
    4: [
        *((HELD, SPILLED, ("ramping",)), (THREE, ONE, ("ramping",)), (ONE, ONE, ("ramping",))),
        *((BF16, BF16_FP32, ("ramping",)), (BF16_TWO, BF16_TWO._replace(stage=3), ("ramping",))),
    ],
}
EVERY_MOVE = [(world, move) for world, moves in MOVES.items() for move in moves]
WITH_MOLS = [(world, move) for world, move in EVERY_MOVE if "stock" not in (move[0].way, move[1].way)]
FIXED = ("ramping", "fixed")
GAIN = Run(1)
ODD: dict[str, tuple[Run, str, str, bool, str]] = {  # run, folder, tag, universal?, what is odd
    "stage 1 to 3": (THREE, ONE.folder, "fixed", False, ""),
    "stage 3 to 2": (TWO, THREE.folder, "fixed", False, ""),
    "stage 0 to 1": (ONE, PLAIN.folder, "ramping", False, ""),
    "stage 1 to 0": (PLAIN, ONE.folder, "fixed", False, ""),
    "stage 1 to 0, weights": (PLAIN, ONE.folder, "fixed", False, "weights"),
    "stage 3 to 0": (PLAIN, THREE.folder, "fixed", False, ""),
    "stage 1 to 2": (TWO, ONE.folder, "fixed", False, ""),
    "stage 2 to 1": (ONE, HELD.folder, "ramping", False, ""),
    "universal at stage 0": (PLAIN, ONE.folder, "fixed_universal", True, ""),
    "not universal": (ONE, ONE.folder, "fixed", True, ""),
    "universal, unasked": (ONE, ONE.folder, "fixed_universal", False, ""),
    "nvme": (ONE, ONE.folder, "fixed_universal", True, "nvme"),
    "robin here": (ONE, "robin", "odd_universal", True, "robin"),
    "robin there": (ONE, "robin", "odd_universal", True, ""),
    "gain": (GAIN, "gain", "odd_universal", True, "gain"),
    "gain at stage 3": (THREE, "gain", "odd_universal", True, "gain"),
}
OTHER_WORLD = (ONE, ONE.folder, "fixed", False, "")
ODD_SOURCES = {"robin": ONE, "gain": GAIN}  # what is odd -> run
FULL: dict[int, list[Move]] = {  # each has a sibling of the same kind on other ranks, named behind it
    1: [
        (HELD, ONE, ("ramping",)),  # offload to none: 3 to HELD the other way, HELD to 2 in ODD
        *((ONE, ONE, ("fixed",)), (THREE, THREE, ("fixed",))),  # ONE to SPILLED, THREE to HELD with every tag
        (BF16, BF16, ("half", "ramping")),  # 4 ranks: BF16 to BF16_FP32
    ],
    3: [
        (HELD, HELD, ("ramping",)),  # 1 rank: THREE to HELD
        (STOCK, TWO, ("ramping",)),  # 2 ranks: STOCK to THREE
        (MOMENTS_THREE, MOMENTS, ("half",)),  # 1 rank: the other way
        (LAYERS, LAYERS, ("ramping",)),  # 1 rank: LAYERS to stage 3
    ],
    4: [(HELD, SPILLED, ("ramping",)), (ONE, ONE, ("ramping",))],  # 1 rank: ONE to SPILLED; 4 ranks: THREE to ONE
}
TIERS = Cases(
    EVERY_MOVE,
    quick=[(3, (ONE, TWO, ("waiting", "half", "ramping")))],
    full=[(world, move) for world, moves in FULL.items() for move in moves],
)
TOLD = Cases(["odd", "other world"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("moves"))


@pytest.fixture(scope="module")
def saved(base: str) -> Mapping[Run, dict[str, Any]]:
    """Source -> tag -> what its first rank knew, of the sources that are moved."""
    moved = {move[0] for _, move in TIERS.wanted}
    odd = {folder for _, folder, *_ in ODD.values()} if TOLD.wanted else set()
    sources = [run for run in SOURCES if run in moved or run.folder in odd]
    cases: list[tuple[Any, ...]] = [("save", base, run, SOURCES[run]) for run in sources]
    cases += [("save_odd", base, run, how) for how, run in ODD_SOURCES.items()] if TOLD.wanted else []
    found = run_cases(work, SAVING_WORLD, cases, timeout=60)
    return {run: found["save", base, run, SOURCES[run]][0] for run in sources}


@pytest.fixture(scope="module")
def loaded(base: str, saved: Mapping[Run, Any]) -> Mapping[int, Results]:
    """Number of ranks -> what they found."""
    cases: dict[int, list[tuple[Any, ...]]] = {world: [] for world in MOVES}
    for world, move in TIERS.wanted:
        cases[world].append(("load", base, *move))
    if TOLD.wanted:
        cases[2] += [("refusal", base, *odd) for odd in ODD.values()]
        cases[3].append(("refusal", base, *OTHER_WORLD))
    return {world: run_cases(work, world, of, timeout=60) for world, of in cases.items()}


def name_of(entry: tuple[int, Move]) -> str:
    """As "3 ranks: 1-fp32--type-initialize-probe to 2-fp32--type-initialize-probe, half ramping"."""
    world, (source, target, tags) = entry
    return f"{world} ranks: {source.folder} to {target.folder}, {' '.join(tags)}"


def unequal(one: Mapping[Any, torch.Tensor], other: Mapping[Any, torch.Tensor]) -> list[Any]:
    """The keys of tensors that are not the same, or missing."""
    return sorted(key for key in {*one, *other} if key not in other or not torch.equal(one[key], other[key]))


def apart(one: Mapping[str, torch.Tensor], tensors: Mapping[tuple[str, str], torch.Tensor]) -> float:
    """The largest difference of a weight."""
    return max(float((values - tensors[name, "fp32"]).abs().max()) for name, values in one.items())


@TIERS.parametrize(("world", "move"), ids=name_of)
def test_weights_and_moments_move_bit_for_bit(base: str, saved: Any, loaded: Any, world: int, move: Move) -> None:
    source, target, tags = move
    for found in loaded[world]["load", base, *move]:
        for tag in tags:
            truth, seen = saved[source][tag], found[tag]
            assert {key for _, key in truth["tensors"]} == set(STATES)
            assert unequal(truth["tensors"], seen["tensors"]) == [], tag
            assert (seen["step"], seen["counters"]) == (truth["step"], truth["counters"]), tag
            if target == STOCK_THREE:
                assert seen["options"][1] == seen["options"][0], "DeepSpeed's fault that `repair` undoes is gone"
                continue
            assert seen["options"] == truth["options"]
            assert seen["apart"], "a step counter that several shards share counts each of them"
            assert [options["weight_decay"] for options in seen["options"]] == [DECAY, 0.0]
            assert seen["options"][0]["lr"] < seen["options"][1]["lr"]


@TIERS.parametrize(("world", "move"), WITH_MOLS, ids=name_of)
def test_phase_alphas_and_ramp_go_on(base: str, saved: Any, loaded: Any, world: int, move: Move) -> None:
    source, target, tags = move
    ranks = loaded[world]["load", base, *move]
    for rank, found in enumerate(ranks):
        for tag in tags:
            truth, seen = saved[source][tag], found[tag]
            if tag in FIXED:
                assert len(set(truth["alphas"].values())) > 2 and seen["alphas"] == truth["alphas"]
                assert seen["next"]["trace"] == truth["next"]["trace"], tag
                assert (seen["now"], seen["warned"]) == ((tag, SAMPLES), [])
                if target.dtype == "fp32":
                    assert apart(truth["oracle"], truth["next"]["after"]) < ATOL, "the uninterrupted run"
                    assert apart(truth["oracle"], seen["next"]["after"]) < ATOL, tag
                    assert apart(truth["oracle"], truth["tensors"]) > 1000 * ATOL, "the comparison must see a step"
            else:
                check_before_alphas(truth, seen, tag, target, rank)
            assert seen["next"].get("alphas") == ranks[0][tag]["next"].get("alphas")


def check_before_alphas(truth: Any, seen: Any, tag: str, target: Run, rank: int) -> None:
    """A partial calibration starts over with a warning, except in mode "moments"; waiting continues."""
    after = seen["next"]
    assert after["samples"] == SAMPLES and after["held"] == 0 and len(set(after["alphas"].values())) > 2
    if tag == "waiting" or target.mode == "moments":
        kept = ("waiting", 0) if tag == "waiting" else ("calibrating", HALF)
        assert (seen["now"], seen["warned"]) == (kept, [])
        return
    assert seen["now"] == ("calibrating", 0)
    assert len(seen["warned"]) == (rank == 0)
    if rank == 0:
        assert "cannot be continued" in seen["warned"][0] and "starts over" in seen["warned"][0]


@TIERS.parametrize(("world", "move"), [entry for entry in WITH_MOLS if "waiting" in entry[1][2]], ids=name_of)
def test_waiting_runs_measure_the_same_alphas_on_any_ranks(
    base: str, saved: Any, loaded: Any, world: int, move: Move
) -> None:
    """The window after the load sees the batches that the saving run's saw."""
    source, target, _ = move
    assert target.dtype == "fp32"
    for found in loaded[world]["load", base, *move]:
        expected = saved[source]["ramping"]["alphas"]
        assert found["waiting"]["next"]["alphas"] == pytest.approx(expected, rel=ALPHA_RTOL)


@TIERS.parametrize(("world", "move"), [entry for entry in EVERY_MOVE if entry[1][0].way == "stock"], ids=name_of)
def test_stock_checkpoints_get_a_calibration(base: str, loaded: Any, world: int, move: Move) -> None:
    """And DeepSpeed without MoLS loads ours: `load` steps such engines."""
    for rank, found in enumerate(loaded[world]["load", base, *move]):
        seen = found["ramping"]
        assert seen["now"] == ("calibrating", 0) and len(set(seen["next"]["alphas"].values())) > 2
        assert len(seen["warned"]) == (2 if rank == 0 else 0)
        assert rank or ("no MoLS state" in seen["warned"][0] and "begins now" in seen["warned"][1])


@TOLD.reads("odd", "other world")
def test_what_cannot_move_is_refused_with_the_way_out(base: str, loaded: Any) -> None:
    said = {name: loaded[2]["refusal", base, *odd] for name, odd in ODD.items()}
    parts = {
        "stage 1 to 3": ("MolsCheckpointError", "saved at ZeRO stage 1 or 2, this run is at 3", "ds_to_universal"),
        "stage 3 to 2": ("MolsCheckpointError", "saved at ZeRO stage 3, this run is at 2", '"load_universal": true'),
        "stage 0 to 1": ("MolsCheckpointError", "saved at ZeRO stage 0, this run is at 1", "load_module_only"),
        "stage 1 to 0": ("MolsCheckpointError", "saved at ZeRO stage 1 or 2, this run is at 0", "same stage"),
        "stage 3 to 0": ("MolsCheckpointError", "saved at ZeRO stage 3, this run is at 0", "same stage"),
        "universal at stage 0": ("MolsUnsupportedError", "stage 0", "resume at stage 1, 2 or 3"),
        "not universal": ("MolsCheckpointError", "not a universal checkpoint", "ds_to_universal"),
        "universal, unasked": ("MolsCheckpointError", "is a universal checkpoint", '"load_universal": true'),
        "nvme": ("MolsUnsupportedError", "NVMe", "offload_optimizer on the CPU"),
        "robin here": ("MolsUnsupportedError", "round_robin_gradients in this run", "same number of ranks"),
        "robin there": ("MolsUnsupportedError", "round_robin_gradients in the run that saved it"),
        "gain": ("MolsUnsupportedError", "rank 1 has no element of a parameter group", "ZeRO stage 3"),
    }
    for name, expected in parts.items():
        for text in said[name]:
            assert "\n" not in text and all(part in text for part in expected), (name, text)
    for name in ("stage 1 to 0, weights", "stage 1 to 2", "stage 2 to 1"):
        assert said[name] == ["", ""], name
    for text in loaded[3]["refusal", base, *OTHER_WORLD]:
        assert text.startswith("MolsCheckpointError") and "ds_to_universal" in text


@TOLD.reads("odd")
def test_frozen_weights_and_buffers_are_named(base: str, loaded: Any) -> None:
    first, second = loaded[2]["refusal", base, *ODD["gain at stage 3"]]
    assert second == "" and "1 frozen parameters and 1 buffers (embed_tokens.weight, seen)" in first
