"""`"unseen_rows"` on ZeRO: what it leaves out, in each mode and stage, with shards that cut a row in two.

tests/engines/deepspeed/test_statistics.py compares the values with the reference's.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.engines.deepspeed.engines import MICROS, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.state import owned
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.adamw import AdamSettings
from tests.helpers.oracle.sizes import HIDDEN, VOCABULARY
from tests.helpers.oracle.statistics import tokens_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD, SAMPLES = 2, 4
HEAD = "lm_head.weight"
Case = tuple[str, int, str]
EVERY: list[Case] = [
    (mode, stage, value)
    for mode in ("probe", "online", "moments")
    for stage in (1, 2, 3)
    for value in ("exclude", "include")
]
CASES = Cases(EVERY, quick=[case for case in EVERY if case[:2] in (("probe", 2), ("moments", 3))])


def measure(mode: str, stage: int, value: str) -> dict[str, Any]:
    """On each rank: one calibration from the first step on."""
    section = {"mode": mode, "start": 0, "samples": SAMPLES, "ramp_end": 20, "unseen_rows": value}
    engine = engine_of(config(stage, section), "llama", AdamSettings(lr=1e-3))
    for iteration in range(SAMPLES):
        iterate(engine, iteration)
    found = {"rows": engine.mols.report()["groups"], "owned": owned(engine)}
    engine.destroy()
    return found


@functools.cache
def results() -> Results:
    return run_cases(measure, WORLD, CASES.wanted, timeout=60)


@CASES.parametrize(("mode", "stage", "value"))
def test_rows_of_tokens_that_do_not_occur(mode: str, stage: int, value: str) -> None:
    ranks = results()[mode, stage, value]
    pieces = [[item for item in rank["owned"] if item[0] == HEAD] for rank in ranks]
    if stage == 3:
        assert any(start % HIDDEN for held in pieces for _, start, *_ in held), "a row is cut between two ranks"
    else:
        assert not all(pieces), "a rank has nothing of the head"
    for rank in ranks:
        row = rank["rows"]["head"]
        if value == "include":
            assert row["unseen_share"] is None
        elif mode == "moments":  # the tokens before the last step, but those that only end a sequence
            before = 1 - int(tokens_of(range(SAMPLES - 1), WORLD, MICROS, VOCABULARY).sum()) / VOCABULARY
            assert before <= row["unseen_share"] < 1
        else:
            seen = tokens_of(range(SAMPLES), WORLD, MICROS, VOCABULARY)
            assert row["unseen_share"] == pytest.approx(1 - int(seen.sum()) / VOCABULARY)


@CASES.parametrize(("mode", "stage"), [("probe", 2), ("moments", 3)], reads=lambda place: [
    (*place, "exclude"), (*place, "include")
])  # fmt: skip
def test_the_head_looks_noisier_without_them(mode: str, stage: int) -> None:
    """Its rows that only the softmax moves have almost no noise."""
    exclude, include = (results()[mode, stage, value][0]["rows"] for value in ("exclude", "include"))
    assert exclude["head"]["damping"] < 0.9 * include["head"]["damping"]
    assert exclude["mlp"]["damping"] == include["mlp"]["damping"]
