"""LAMB, Adam-mini and SGG on real engines against single-process references, with and without MoLS."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.deepspeed.sharded import ODD, REFUSED, SETTINGS, slow, truth, work
from tests.engines.deepspeed.state import NOT_SAVED
from tests.helpers.digests import differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.models import build
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.timeout(700)  # one test waits for its whole launch; seconds, on a busy machine minutes

WORLD, WIDE_WORLD = 2, 4
# float32 on both sides, sums in another order. A weight between 1 and 2 is rounded by up to 6e-8. In each of 5 steps,
# either side rounds it once before its step is scaled by a rate of up to 3, and once after: 2 x 5 x 4 x 6e-8 = 2.4e-6.
# Measured: up to 6e-7.
ATOL = 3e-6
MOVED = 1e-3
FLIPS = 2  # elements of a model that rounding may put on the other side of a border between two clusters of SGG
KINDS = tuple(SETTINGS)

TRAINED = Cases(
    [
        *((kind, "gpt2", stage, False) for kind in KINDS for stage in (0, 1, 3)),
        *((kind, "gpt2", stage, True) for kind in KINDS for stage in (1, 2, 3)),
        *((kind, "llama", stage, True) for kind, stage in zip(KINDS, (3, 3, 1), strict=True)),
    ],
    quick=[("lamb", "gpt2", 3, True), ("adam_mini", "gpt2", 1, False), ("sgg", "gpt2", 0, False)],
    full=lambda case: case[1] == "gpt2" and case[2:] in ((2, True), (3, False)),
)
WIDE_TRAINED = [("lamb", "gpt2", 3, True), ("adam_mini", "gpt2", 1, True), ("sgg", "llama", 3, False)]
REPLAYED = [("adam_mini", name) for name in ODD] + [("lamb", "stage 0 bf16"), ("lamb", "stage 3 bf16 offload")]
REPLAYED += [("sgg", "stage 1 bf16 fp32 gradients"), ("sgg", "stage 2 bf16 offload")]
RESUMED = [("lamb", 1), ("lamb", 2), ("adam_mini", 0), ("adam_mini", 1), ("adam_mini", 3), ("sgg", 0), ("sgg", 2)]
RESUMED += [("sgg", 3)]
MOVED_ON = [("lamb", 1), ("sgg", 3)]
OTHERS: Cases[tuple[Any, ...]] = Cases(
    [
        *(("replay", *case) for case in REPLAYED),
        *(("resume", *case) for case in RESUMED),
        *(("save universal", *case) for case in MOVED_ON),
        *(("refuse", what) for what in REFUSED),
    ],
    quick=[("resume", "adam_mini", 3), ("refuse", "unbound")],
    full=[
        *(("replay", "lamb", "stage 3 bf16 offload"), ("replay", "sgg", "stage 2 bf16 offload")),
        ("replay", "adam_mini", "stage 1 bf16 fp32 gradients"),
        *(("resume", "lamb", 2), ("resume", "adam_mini", 1), ("resume", "sgg", 0), ("resume", "sgg", 2)),
    ],
)
WIDE: Cases[tuple[Any, ...]] = Cases(
    [*(("train", *case) for case in WIDE_TRAINED), *(("load universal", *case) for case in MOVED_ON)],
    full=[("train", "adam_mini", "gpt2", 1, True), ("train", "sgg", "llama", 3, False)],
)
IN_A_FOLDER = ("resume", "save universal", "load universal")


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sharded_")


@functools.cache
def trained() -> Results:
    return run_cases(work, WORLD, [("train", *case) for case in TRAINED.wanted], timeout=120)


def placed(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """The case as a rank gets it: with the folder of its files, if it has any."""
    return (*case, folder().name) if case[0] in IN_A_FOLDER else case


@functools.cache
def others() -> Results:
    """All other cases on two ranks; a second launch, since a test has a time limit."""
    return run_cases(work, WORLD, [placed(case) for case in OTHERS.wanted], timeout=120)


@functools.cache
def wide() -> Results:
    others()  # saves what is loaded here
    return run_cases(work, WIDE_WORLD, [placed(case) for case in WIDE.wanted], timeout=120)


def outcomes(world: int, *case: Any) -> list[Any]:
    """What the case gave on each rank."""
    if world == WIDE_WORLD:
        return wide()[placed(case)]
    return (trained() if case[0] == "train" else others())[placed(case)]


def assert_equal(kind: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    errors = torch.cat([(got[name] - w).abs().view(-1) for name, w in expected.items()]).sort(descending=True).values
    assert float(errors[FLIPS if kind == "sgg" else 0]) <= ATOL


def assert_trained(world: int, kind: str, name: str, stage: int, mols: bool) -> None:
    """Every rank has the reference's weights, and the shards were cut as this test needs it."""
    expected, before = truth(kind, name, world, mols), build(name).state_dict()
    assert all(float((before[n] - w).abs().max()) > MOVED for n, w in expected.items())
    results = outcomes(world, "train", kind, name, stage, mols)
    for outcome in results:
        assert_equal(kind, outcome["weights"], expected)
    if stage == 0:
        return
    ranks_of: dict[str, int] = {}
    for outcome in results:
        for parameter, _, _, _ in outcome["owned"]:
            ranks_of[parameter] = ranks_of.get(parameter, 0) + 1
    assert max(ranks_of.values()) > 1  # a parameter that straddles ranks
    assert stage == 3 or min(ranks_of.values()) < world  # a rank that holds nothing of one; stage 3 cuts every matrix


# --------------------------------------------------------------------------------------------------------------- tests


@TRAINED.parametrize(("kind", "name", "stage", "mols"))
def test_weights_equal_the_single_process_reference(kind: str, name: str, stage: int, mols: bool) -> None:
    """The shards' sums are those of whole parameters, and MoLS scales each element's step."""
    assert_trained(WORLD, kind, name, stage, mols)


@TRAINED.parametrize(
    ("kind", "stage"),
    [(kind, stage) for kind in KINDS for stage in (1, 3)],
    reads=lambda case: [(case[0], "gpt2", case[1], False)],
)
def test_a_step_sends_one_small_sum_of_one_length(kind: str, stage: int) -> None:
    """LAMB two numbers a shared parameter, Adam-mini one a shared block; SGG nothing but in every second step."""
    results = outcomes(WORLD, "train", kind, "gpt2", stage, False)
    assert results[0]["sent"] == results[1]["sent"]
    sent = results[0]["sent"]
    elements = sum(p.numel() for p in build("gpt2").parameters())
    if kind == "sgg":
        assert not sent[0] and not sent[1] and sent[2] and not sent[3] and sent[4]
        return
    assert all(step == sent[0] for step in sent)
    ((operation, size),) = sent[0]
    assert operation == "allreduce" and 0 < size <= 8 * elements / 20
    if stage == 1:
        assert sent[0][operation, size] == 2  # DeepSpeed steps once a parameter group


@OTHERS.parametrize(("kind", "odd"), REPLAYED, reads=lambda case: [("replay", *case)])
def test_odd_engines_step_their_masters_as_the_reference_does(kind: str, odd: str) -> None:
    """The reference gets the gradients that the inner optimizer got, so that the rounding of bf16 is in both."""
    for outcome in outcomes(WORLD, "replay", kind, odd):
        reference = build("gpt2")
        parameters = dict(reference.named_parameters())
        if odd == "stage 0 bf16":  # its constructor steps once, with gradients of zero
            for p in parameters.values():
                p.data.copy_(p.data.bfloat16())
        else:
            for name, p in parameters.items():
                p.data.copy_(outcome["before"][name])
        step = slow(kind, reference)
        if odd == "stage 0 bf16":
            step({name: torch.zeros_like(p) for name, p in parameters.items()})
            assert_equal(kind, outcome["before"], {name: p.detach() for name, p in parameters.items()})
        for gradients in outcome["gradients"]:
            step(gradients)
        assert_equal(kind, outcome["after"], {name: p.detach() for name, p in parameters.items()})
        moved = [float((outcome["after"][name] - w).abs().max()) for name, w in outcome["before"].items()]
        assert min(moved) > MOVED


@OTHERS.parametrize(("kind", "stage"), RESUMED, reads=lambda case: [("resume", *case)])
def test_a_resumed_run_goes_on_bit_for_bit(kind: str, stage: int) -> None:
    for prints in outcomes(WORLD, "resume", kind, stage):
        for saved, loaded in zip(prints["saved"], prints["loaded"], strict=True):
            assert saved.keys() == loaded.keys()
            assert differing(saved, loaded, *NOT_SAVED) == []
        assert prints["saved"][0] != prints["saved"][-1]


@WIDE.parametrize(("kind", "name", "stage", "mols"), WIDE_TRAINED, reads=lambda case: [("train", *case)])
def test_weights_on_four_ranks_equal_the_single_process_reference(kind: str, name: str, stage: int, mols: bool) -> None:
    assert_trained(WIDE_WORLD, kind, name, stage, mols)


@WIDE.parametrize(("kind", "stage"), MOVED_ON, reads=lambda case: [("load universal", *case)])
@OTHERS.reads(*(("save universal", *case) for case in MOVED_ON))
def test_moments_move_with_a_universal_checkpoint(kind: str, stage: int) -> None:
    """From two ranks to four; SGG's clusters do not, and it says so."""
    saved = outcomes(WORLD, "save universal", kind, stage)[0]
    for loaded in outcomes(WIDE_WORLD, "load universal", kind, stage):
        for key in ("exp_avg", "exp_avg_sq"):
            assert all(torch.equal(loaded[key][name], value) for name, value in saved[key].items())
            assert any(bool(value.any()) for value in saved[key].values())
        assert all(torch.equal(loaded["weights"][name], value) for name, value in saved["weights"].items())
        assert not all(torch.equal(loaded["next"][name], value) for name, value in saved["weights"].items())
        assert loaded["steps"] == {4}
        assert bool(loaded["warned"]) == (kind == "sgg")


@OTHERS.parametrize("what", REFUSED, reads=lambda what: [("refuse", what)])
def test_what_would_be_wrong_is_refused_by_name(what: str) -> None:
    for message in outcomes(WORLD, "refuse", what):
        assert REFUSED[what] in message
