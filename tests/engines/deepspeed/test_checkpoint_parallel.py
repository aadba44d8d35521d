"""Universal checkpoints of tensor- and pipeline-parallel DeepSpeed engines, moved to other sizes.

A run on another grid saves and converts its state again; the files are compared one by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.harness import run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

ATOL = 1e-6  # of weights after two more steps of 1e-3: sums in another order
SAVED, FOLLOWED = 7, 2  # iterations: one update, a window of 4, two updates of the ramp; then more of it
SECTION = {"mode": "probe", "start": 1, "samples": 4, "ramp_end": 20, "total_steps": 50}


class Grid(NamedTuple):
    """`kind`: "auto" (AutoTP of size `size`) or "tied" (a PipelineModule of `size` stages with tied embeddings)."""

    kind: str
    size: int
    stage: int


MOVES = {  # ranks that load -> target: source
    1: {
        Grid("auto", 1, 3): Grid("auto", 2, 1),
        Grid("auto", 1, 1): Grid("auto", 2, 3),
        Grid("tied", 1, 1): Grid("tied", 2, 1),
    },
    4: {Grid("auto", 2, 3): Grid("auto", 2, 1), Grid("tied", 2, 1): Grid("tied", 2, 1)},
}
CASES = Cases(
    [(world, target) for world, moves in MOVES.items() for target in moves],
    full=[(1, Grid("auto", 1, 1)), (4, Grid("tied", 2, 1))],
)


def grid_engine(grid: Grid, universal: bool) -> Any:
    from tests.engines.deepspeed.engines import config, engine_of
    from tests.engines.deepspeed.models import model_of
    from tests.engines.deepspeed.pipeline import pipeline_engine

    loading = {"checkpoint": {"load_universal": universal}}
    if grid.kind == "auto":
        tensor = {"tensor_parallel": {"autotp_size": grid.size}} if grid.size > 1 else {}
        model = model_of("llama")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        settings = config(grid.stage, SECTION, **tensor, **loading)
        return engine_of(settings, model, optimizer)
    return pipeline_engine(True, grid.stage, "float32", SECTION, stages=grid.size, more=loading)


def go(engine: Any, grid: Grid, iteration: int) -> None:
    """A global batch; every rank of data parallelism sees the same."""
    from tests.engines.deepspeed.engines import MICROS
    from tests.helpers.oracle.models import batch, loss_of

    batches = [batch(iteration, micro, 0) for micro in range(MICROS)]
    if grid.kind != "auto":
        engine.train_batch(data_iter=iter([(tokens, tokens) for tokens in batches]))
        return
    for tokens in batches:
        engine.backward(loss_of(engine, tokens))
        engine.step()


def run(base: str, grid: Grid, source: Grid | None) -> dict[str, Any]:
    """Train, or resume from what `source` saved; save, convert; train on, save, convert."""
    from tests.engines.deepspeed.moves import convert
    from tests.helpers.digests import caught

    folder = str(Path(base, "-".join(map(str, (*grid, *(source or ()))))))
    engine, warned = grid_engine(grid, source is not None), []
    if source is None:
        for iteration in range(SAVED):
            go(engine, grid, iteration)
    else:
        with caught() as warned:
            engine.load_checkpoint(str(Path(base, "-".join(map(str, source)))), tag="now_universal")
    found = {"alphas": engine.mols.alphas, "phase": engine.mols.phase, "warned": warned}
    engine.save_checkpoint(folder, tag="now")
    convert(folder, "now")
    if grid.stage == 3 and source is not None:  # DeepSpeed's stage 3 does not step after it has saved what it loaded
        engine.destroy()
        engine = grid_engine(grid, True)
        engine.load_checkpoint(folder, tag="now_universal")
    for iteration in range(SAVED, SAVED + FOLLOWED):
        go(engine, grid, iteration)
    engine.save_checkpoint(folder, tag="later")
    convert(folder, "later")
    found |= {tag: contents(Path(folder, f"{tag}_universal")) for tag in ("now", "later")}
    found["multipliers"] = engine.mols.multipliers
    engine.destroy()
    return found


def contents(folder: Path) -> dict[str, Tensor]:
    """Every weight and moment of a universal checkpoint, flat; stage 3 leaves the step counters elsewhere."""
    found = {}
    for path in sorted((folder / "zero").glob("*/*.pt")):
        if path.name != "step.pt":
            content = torch.load(path, weights_only=False)
            found[f"{path.parent.name} {path.stem}"] = content["param"] if isinstance(content, dict) else content
    return {name: values.detach().flatten() for name, values in found.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Grid], tuple[Any, Any]]:
    """(ranks, target) -> what the first saving rank and each loading rank found."""
    base = str(tmp_path_factory.mktemp("parallel"))
    sources = sorted({MOVES[world][target] for world, target in CASES.wanted})
    saved = run_cases(run, 2, [(base, source, None) for source in sources], timeout=60)
    result = {}
    for world, moves in MOVES.items():
        cases = [(base, target, source) for target, source in moves.items() if (world, target) in CASES.wanted]
        loaded = run_cases(run, world, cases, timeout=60)
        for case in cases:
            result[world, case[1]] = (saved[base, case[2], None][0], loaded[case])
    return result


@CASES.parametrize(("world", "target"))
def test_a_universal_checkpoint_moves_to_another_grid(found: Any, world: int, target: Grid) -> None:
    truth, ranks = found[world, target]
    assert truth["phase"] == "ramping" and len(set(truth["alphas"].values())) > 2 and len(truth["now"]) > 40
    for rank in ranks:
        assert (rank["phase"], rank["alphas"], rank["warned"]) == ("ramping", truth["alphas"], [])
        assert rank["multipliers"] == truth["multipliers"]
        assert rank["now"].keys() == truth["now"].keys()
        assert [name for name, values in truth["now"].items() if not torch.equal(values, rank["now"][name])] == []
        weights = [name for name in truth["later"] if name.endswith(" fp32")]
        assert max(float((rank["later"][name] - truth["later"][name]).abs().max()) for name in weights) < ATOL
        assert max(float((truth["now"][name] - truth["later"][name]).abs().max()) for name in weights) > 100 * ATOL
