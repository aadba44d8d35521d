"""Simulated worlds: each element once on thousands of ranks, faults are found, and real ranks own the same pieces."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from mols_ds import cli
from mols_ds.apps.plan import command as plan_command
from mols_ds.core.groups import group_table
from mols_ds.core.ranges import ShardRange
from tests.helpers.harness import run_cases
from tests.helpers.tiers import Cases
from tests.tools.simulate.command import EVEN, Result, SimulatedJob, main, simulate, table_jobs
from tests.tools.simulate.count import Count
from tests.tools.simulate.zero_world import ZeroWorld, decay_groups

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SEVEN = str(CONFIGS / "models" / "llama_7b.json")
SEVENTY = str(CONFIGS / "models" / "llama_70b.json")
GRID = str(CONFIGS / "megatron" / "llama_7b_tp2_pp2.yaml")
ELEMENTS = {SEVEN: 6_738_415_616, SEVENTY: 70_553_706_496, GRID: 6_738_415_616}
GIB = 4.0

WALKS = [
    SimulatedJob(source=SEVEN, stage=3, ranks=8),
    SimulatedJob(source=SEVEN, stage=3, ranks=4096),
    SimulatedJob(source=SEVENTY, stage=1, ranks=64),
    SimulatedJob(source=GRID, ranks=8),
]


NUMBERS = Cases(range(len(WALKS)), quick=[0, 3])


@functools.cache
def results() -> dict[int, Result]:
    numbers = NUMBERS.wanted
    return dict(zip(numbers, simulate(*(WALKS[number] for number in numbers), seconds=280), strict=True))


@NUMBERS.parametrize("number")
def test_each_element_is_counted_once(number: int) -> None:
    job, result = WALKS[number], results()[number]
    assert result.job == job
    assert result.faults == ()
    assert result.same_when_built
    assert result.summed is not False
    assert result.elements == ELEMENTS[job.source]
    assert result.mean * job.ranks == result.elements
    assert 1 <= result.balance <= EVEN
    assert result.least <= result.mean <= result.most
    assert result.peak_gib < GIB
    assert result.holds


def test_the_table_has_both_sizes_at_every_number_of_ranks() -> None:
    jobs = table_jobs(CONFIGS)
    assert all(Path(job.source).is_file() for job in jobs)
    for size in ("llama_7b", "llama_70b"):
        assert {job.ranks for job in jobs if size in job.source} == {8, 64, 512, 4096}
        assert {job.stage for job in jobs if size in job.source} == {None, 1, 2, 3}


# ------------------------------------------------------------------------------------------------- broken shards


class Small(torch.nn.Module):
    """Groups come from names alone; odd sizes, so that three ranks need padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(97, 19)
        self.q_proj, self.v_proj = (torch.nn.Linear(19, 19, bias=False) for _ in range(2))
        self.up_proj = torch.nn.Linear(19, 33)
        self.norm = torch.nn.LayerNorm(19)
        self.lm_head = torch.nn.Linear(19, 97, bias=False)


def on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return Small()


@functools.cache
def walked() -> list[list[ShardRange]]:
    return list(ZeroWorld(on_meta, stage=2, ranks=3).ranges())


def renumbered(pieces: list[ShardRange]) -> list[ShardRange]:
    """The same pieces without gaps among their accumulators."""
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + piece.numel)
    return [piece._replace(offset=offset) for piece, offset in zip(pieces, ends, strict=False)]


def faults_of(ranks: list[list[ShardRange]]) -> str:
    count = Count(group_table(on_meta()))
    for pieces in ranks:
        count.add(pieces)
    return "; ".join(count.finish().faults)


def test_a_dropped_and_a_doubled_piece_are_named() -> None:
    whole = walked()
    assert faults_of(whole) == ""
    *rest, last = whole
    dropped = last[1]
    broken = faults_of([*rest, renumbered([last[0], *last[2:]])])
    assert f"{dropped.name}: elements" in broken
    assert "counted by no rank" in broken
    assert "group " in broken
    doubled = whole[0][-1]
    broken = faults_of([whole[0], renumbered([doubled, *whole[1]]), whole[2]])
    assert f"{doubled.name}: elements" in broken
    assert "counted more than once" in broken
    assert "elements counted, " in broken


def test_a_shifted_boundary_and_a_gap_among_the_accumulators_are_named() -> None:
    first, second, third = walked()
    at = first[-1]
    moved = faults_of([[*first[:-1], at._replace(numel=at.numel - 1)], second, third])
    assert f"{at.name}: elements {at.start + at.numel - 1:,} to {at.start + at.numel:,} are counted by no rank" in moved
    gap = faults_of([first, [piece._replace(offset=piece.offset + 1) for piece in second], third])
    assert "lies at 1 of its accumulators, not 0" in gap


def test_swapped_halves_keep_the_sums_and_are_caught_all_the_same() -> None:
    """One rank counts a range twice, none its neighbour: every group's total is right."""
    first, second, third = walked()
    at = next(piece for piece in third if piece.numel > 8)
    half = at.numel // 2
    cut = third.index(at)
    broken = [*third[:cut], at._replace(numel=half), at._replace(numel=at.numel - half), *third[cut + 1 :]]
    output = faults_of([first, second, renumbered(broken)])
    assert "group " not in output
    assert "counted more than once" in output or "counted by no rank" in output


def test_the_sums_of_a_rank_are_those_of_the_layouts() -> None:
    count = Count(group_table(on_meta()))
    for pieces in walked():
        assert count.sum_of(pieces) == count.expected_sum(pieces)
        assert sum(count.sum_of(pieces).values()) == sum(piece.numel for piece in pieces)


# ------------------------------------------------------------------------------------------------------- real ranks

STAGES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"round_robin_gradients": True}),
    (3, {}),
    (3, {"sub_group_size": 900}),
]

RANKS = 3  # divides none of the sizes: every flat buffer is padded


def real_pieces(stage: int, options: tuple[tuple[str, Any], ...]) -> list[tuple[Any, ...]]:
    """What this rank's real engine owns."""
    import deepspeed

    from mols_ds.engines.deepspeed.shards import find_shards

    torch.manual_seed(0)
    model = Small()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **dict(options)},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(decay_groups(model), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    owned, offset = [], 0
    for _, piece in find_shards(engine).owned:
        owned.append((piece.name, piece.start, offset, piece.numel))
        offset += piece.numel
    return owned


@pytest.mark.distributed
@pytest.mark.tier("all")
def test_real_ranks_own_what_simulated_ones_do() -> None:
    cases = [(stage, tuple(options.items())) for stage, options in STAGES]
    real = run_cases(real_pieces, RANKS, cases)
    for stage, options in STAGES:
        zero = ZeroWorld(on_meta, stage=stage, ranks=RANKS, options=options)
        simulated = [[tuple(piece) for piece in pieces] for pieces in zero.ranges()]
        assert real[(stage, tuple(options.items()))] == simulated, f"stage {stage} {options}"


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.json"], "nope.json: no such model file"),
        ([GRID, "--ranks", "6"], "needs a multiple of 4 ranks, not 6"),
        ([], "name a model file or a Megatron config"),
        ([SEVEN, "--config", "nope.json"], "config nope.json: no such file"),
    ],
    ids=["no model", "odd ranks", "nothing", "no config"],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_row_that_does_not_hold_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Result(
        job=SimulatedJob(source=SEVEN, stage=3, ranks=8), elements=10, pieces=2, least=4, mean=5.0, most=6, balance=1.2,
        faults=("x: elements 0 to 1 are counted by no rank",), same_when_built=False, summed=False,
    )  # fmt: skip
    monkeypatch.setattr("tests.tools.simulate.command.simulate", lambda job: [bad])
    assert main([SEVEN]) == 1
    output = capsys.readouterr().out
    for words in ("NO", "counted by no rank", "1.200 of its stage's mean", "built whole", "GroupSums counted"):
        assert words in output


def test_without_a_checkout_both_commands_say_what_to_do_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An installed package has no tests."""
    monkeypatch.setattr(plan_command, "__file__", str(tmp_path / "site-packages/mols_ds/apps/plan/command.py"))
    config = str(CONFIGS / "ds_7b_zero3.json")
    assert cli.main(["plan", SEVEN, "--config", config, "--memory", "80GiB", "--steps", "10", "--simulate"]) == 2
    monkeypatch.setattr("sys.argv", ["simulate", "--all"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("mols_ds.plan.simulate", run_name="__main__")
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("checkout of mols-ds (pip install -e .)" in line for line in lines)
