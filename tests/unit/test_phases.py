"""The phases as a pure state machine, the schedule's shares and "auto", and the multipliers of every step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mols_ds.core.config import MolsConfig
from mols_ds.core.phases import FIRST_AUTO_CHECK, Calibration, Schedule, resolve_schedule
from mols_ds.errors import MolsConfigError

ALPHAS = {"qk": 0.5, "mlp": 3.0, "other": 1.0}


def schedule_of(section: dict[str, Any], total: int | None = None, warmup: int | None = None) -> Schedule:
    return resolve_schedule(MolsConfig.parse(section), total, warmup)


def calibrated(t: int, *, schedule: Schedule | None = None, every: int | None = None) -> Calibration:
    """A calibration that began at the schedule's start and ended before step t with ALPHAS."""
    state = Calibration(schedule or Schedule(2, 12), 4, 16, every)
    state.begin(state.schedule.start)
    for _ in range(4):
        state.count(True)
    state.end(t, ALPHAS)
    return state


# ---------------------------------------------------------------------- schedule


def test_shares_and_steps() -> None:
    assert schedule_of({}, total=1000) == Schedule(10, 100)
    assert schedule_of({"total_steps": 500}, total=1000) == Schedule(5, 50)  # the section's own number applies
    assert schedule_of({"start": 7, "ramp_end": 70}) == Schedule(7, 70)
    assert schedule_of({"start": 7, "ramp_end": 0.5, "ramp": "cosine"}, total=100) == Schedule(7, 50, "cosine")
    assert schedule_of({"start": 3, "ramp_end": "auto"}, warmup=9) == Schedule(3, 9)


@pytest.mark.parametrize(
    ("section", "total", "warmup", "message"),
    [
        ({}, None, None, r'"mols.start": 0.01 is a share of all steps.*set "mols.total_steps"'),
        ({"start": 0, "ramp_end": 0.5}, None, None, r'"mols.ramp_end": 0.5 is a share'),
        ({"start": 0, "ramp_end": "auto"}, 100, None, r'"mols.ramp_end": "auto" reads the scheduler'),
        ({"start": 50}, 100, None, r"step 50 is after \"mols.ramp_end\" \(step 10\)"),
        ({"start": 20, "ramp_end": "auto"}, 100, 10, r"step 20 is after"),
        ({"start": 200, "ramp_end": 300}, 100, None, r"past the last of 100 steps; start earlier"),
        ({"samples": 96, "start": 5, "mode": "online"}, 100, None, r'"mols.samples": 96 .*from step 5 on.* 100 steps'),
        ({"samples": 96, "start": 5, "mode": "moments"}, 100, None, r'"mols.samples": 96 .*mode "moments"'),
        (
            {"samples": "auto", "start": 5, "ramp_end": 9, "mode": "online"},
            20,
            None,
            r'"mols.samples": 16 \("auto"\) .* 20 steps',
        ),
    ],
)
def test_impossible_schedules(section: dict[str, Any], total: int | None, warmup: int | None, message: str) -> None:
    with pytest.raises(MolsConfigError, match=message) as caught:
        schedule_of(section, total, warmup)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"ramp_end": 101}, ['"mols.ramp_end": step 101 is after the last of 100 steps']),
        ({"fixed_alphas": {"qk": 0.5}, "ramp_end": 200}, ['"mols.ramp_end": step 200 is after']),
        (
            {"recalibrate": {"every": 99}},
            ['"mols.recalibrate.every": 99 steps after the first calibration (from step 1'],
        ),
        ({"ramp_end": 100, "recalibrate": {"every": 98}}, []),
        ({"fixed_alphas": {"qk": 0.5}}, []),
        ({"fixed_alphas": {"qk": 0.5}, "mode": "online"}, ['"mols.mode": no effect beside "fixed_alphas"']),
    ],
)
def test_what_will_not_happen_is_said(section: dict[str, Any], said: list[str]) -> None:
    remarks = schedule_of(section, total=100).remarks
    assert len(remarks) == len(said)
    assert all(remark.startswith(start) for remark, start in zip(remarks, said, strict=True))


@pytest.mark.parametrize(
    "section",
    [
        {"samples": 95, "start": 5, "mode": "online"},
        {"samples": 1000, "start": 5, "mode": "probe"},
        {"samples": "auto", "start": 5, "mode": "online"},
        {"samples": 1000, "start": 5, "mode": "online", "fixed_alphas": {"vo": 2.0}},
    ],
)
def test_a_window_that_fits_or_takes_no_steps(section: dict[str, Any]) -> None:
    schedule = schedule_of(section, 100)
    assert (schedule.start, schedule.ramp_end) == (5, 10)


def test_fraction() -> None:
    """METHOD's f(t): 0 at the end of the calibration, 1 at the end of warm-up."""
    line, wave = Schedule(0, 10), Schedule(0, 10, "cosine")
    assert [line.fraction(t, 2, 10) for t in (0, 2, 4, 6, 10, 99)] == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert wave.fraction(6, 2, 10) == pytest.approx(0.5)
    assert wave.fraction(4, 2, 10) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    values = [wave.fraction(t, 2, 10) for t in range(2, 11)]
    assert values == sorted(values)
    assert line.fraction(5, 5, 5) == 1.0  # a ramp of no length
    assert Schedule(2, 5).fraction(1, 5, 5) == 0.0, "before a ramp without length"


# ---------------------------------------------------------------------- phases


def test_phases_in_order() -> None:
    state = Calibration(Schedule(2, 12), 4, 16)
    assert state.phase == "waiting" and [state.due(t) for t in (0, 1, 2, 3)] == [False, False, True, True]
    assert state.multipliers(1) == {}
    state.begin(2)
    assert state.phase == "calibrating" and not state.due(2) and state.multipliers(2) == {}
    for n in range(4):
        assert state.exhausted() == "no", n
        state.count(True)
    assert state.exhausted() == "complete"
    assert state.end(4, ALPHAS)
    assert (state.phase, state.ramp_until) == ("ramping", 12)
    state.advance(11)
    assert state.phase == "ramping"
    state.advance(12)
    assert state.phase == "fixed" and not state.due(1000)


def test_multipliers_of_every_step() -> None:
    """1 + (alpha - 1) f(t), exactly alpha from the end of the ramp on, 1 for "other" throughout."""
    state = calibrated(4)
    for t in range(4, 15):
        f = min(1.0, (t - 4) / 8)
        expected = {g: 1 + (a - 1) * f for g, a in ALPHAS.items()}
        assert state.multipliers(t) == pytest.approx(expected, abs=1e-15)
    assert state.multipliers(12) == ALPHAS
    assert state.multipliers(4) == dict.fromkeys(ALPHAS, 1.0)


@pytest.mark.parametrize(("ended", "until", "in_time"), [(12, 12, True), (13, 23, False), (500, 510, False)])
def test_a_calibration_that_ends_after_the_ramp(ended: int, until: int, in_time: bool) -> None:
    """The ramp keeps its planned length (10 steps) and is never a jump."""
    state = Calibration(Schedule(2, 12), 4, 16)
    state.begin(2)
    assert state.end(ended, ALPHAS) is in_time
    assert state.ramp_until == until
    assert state.phase == ("fixed" if until == ended else "ramping")


def test_left_out_samples_and_giving_up() -> None:
    """No usable sample in `window` attempts, or 2 x window attempts in all: failed."""
    state = Calibration(Schedule(0, 10), 4, 16)
    state.begin(0)
    for attempt in range(1, 5):
        state.count(False)
        assert state.exhausted() == ("failed" if attempt == 4 else "no")
    state = Calibration(Schedule(0, 10), 4, 16)
    state.begin(0)
    usable = [True, False, False, True, False, False, True, False]
    outcomes = []
    for flag in usable:
        state.count(flag)
        outcomes.append(state.exhausted())
    assert outcomes == ["no"] * 7 + ["failed"]
    assert (state.samples, state.attempts, state.skipped) == (3, 8, 5)


def test_auto_checks_at_powers_of_two() -> None:
    state = Calibration(Schedule(0, 10), "auto", 100)
    assert state.window == 100
    state.begin(0)
    checks = []
    for n in range(1, 101):
        state.count(True)
        if state.check_due():
            checks.append(n)
    assert checks == [16, 32, 64] and FIRST_AUTO_CHECK == 16
    assert state.exhausted() == "complete"
    fixed = Calibration(Schedule(0, 10), 32, 100)
    fixed.begin(0)
    for _ in range(16):
        fixed.count(True)
    assert not fixed.check_due()


def test_recalibration_starts_from_the_present_multipliers() -> None:
    state = calibrated(4, every=20)
    state.advance(12)
    assert [state.due(t) for t in (12, 23, 24)] == [False, False, True]
    state.begin(24)
    assert state.multipliers(24) == ALPHAS and state.old == ALPHAS  # the old ones apply while measuring
    assert (state.samples, state.attempts, state.skipped) == (0, 0, 0)
    for _ in range(4):
        state.count(True)
    fresh = {"qk": 1.5, "mlp": 1.0, "other": 1.0}
    assert not state.end(28, fresh)  # ramp_end is long past: a new ramp of the same length
    assert state.ramp_until == 38
    assert state.multipliers(28) == ALPHAS
    assert state.multipliers(33) == pytest.approx({"qk": 1.0, "mlp": 2.0, "other": 1.0})
    state.advance(38)
    assert state.multipliers(38) == fresh and state.due(48)


@pytest.mark.parametrize("moment", ["waiting", "calibrating", "ramping", "fixed"])
def test_state_round_trip(moment: str) -> None:
    state = Calibration(Schedule(2, 12), 4, 16, 50)
    if moment != "waiting":
        state.begin(2)
        state.count(True)
        state.count(False)
    if moment in ("ramping", "fixed"):
        state.end(6, ALPHAS)
        state.advance(12 if moment == "fixed" else 7)
    assert state.phase == moment
    other = Calibration(Schedule(2, 12), 4, 16, 50)
    other.load_state_dict(state.state_dict())
    assert other == state
    assert [other.multipliers(t) for t in range(20)] == [state.multipliers(t) for t in range(20)]
    assert not {"schedule", "wanted", "max_samples", "every"} & set(state.state_dict())  # the new config's
