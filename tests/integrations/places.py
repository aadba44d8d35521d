"""One place of the table: a client at a stage on so many ranks. Which runs a part of it needs, and what must hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.runs import CLAMPED, ONLINE, SAMPLES, SAVED, STEPS, Run

Seen = dict[str, Any]
Train = Callable[[Run], Seen]
PARTS = ("counts", *SAVED)


def runs_of(train: Train, stage: int, part: str, wholes: dict[str, Seen], window: Mapping[str, Any] = ONLINE) -> Seen:
    """The runs that a part needs.

    "counts": the stock run, one whose alphas are all clamped to 1, one as it is meant. One of SAVED: the run to the end
    that saves there, and one from that checkpoint; in the window with the keys `window`.

    Args:
        wholes: the runs to the end that are there already.
    """
    if part == "counts":
        settings = {"stock": None, "clamped": CLAMPED, "real": {}}
        return {name: train(Run(stage, mols, name, evaluate=True)) for name, mols in settings.items()}
    mols = window if part == "window" else {}
    name = "online" if mols else "whole"
    if name not in wholes:
        wholes[name] = {**train(Run(stage, mols, name, save=True)), "folder": str(Path(name).resolve())}
    whole = wholes[name]
    return {"whole": whole, "resumed": train(Run(stage, mols, f"from_{part}", resume=part, saved=whole["folder"]))}


# ---------------------------------------------------------------------- what must hold


def attached(seen: Seen) -> None:
    """MoLS measured: groups have alphas of their own; the stock run has none."""
    real = seen["real"]
    assert set(seen["stock"]["phases"]) == {"stock"}
    assert real["phase"] == "fixed" and real["samples"] == SAMPLES
    assert list(dict.fromkeys(real["phases"])) == ["waiting", "calibrating", "ramping", "fixed"]
    assert len(set(real["alphas"].values())) > 2


def counts(seen: Seen) -> None:
    """Updates, micro-steps, data, evaluations, epochs, checkpoints are the stock run's; with alphas of 1 every bit."""
    stock, clamped, real = seen["stock"], seen["clamped"], seen["real"]
    assert len(stock["counts"]) >= STEPS - 2
    assert clamped["counts"] == real["counts"] == stock["counts"]
    assert set(clamped["alphas"].values()) == {1.0} and clamped["samples"] == SAMPLES
    for key in ("weights", "random"):
        assert clamped[key] == stock[key], key
    for key in stock["same"]:
        assert clamped["same"][key] == stock["same"][key], key
    assert real["weights"] != stock["weights"]


def schedule(seen: Seen) -> None:
    """The base rate at each update."""
    assert seen["clamped"]["lrs"] == seen["real"]["lrs"] == seen["stock"]["lrs"]
    assert len(set(seen["stock"]["lrs"])) > STEPS // 2


def logs(seen: Seen) -> None:
    """Rates, multipliers, alphas and SNR are where the client logs, at each update."""
    real = seen["real"]
    rows = real["logs"]
    assert [row["update"] for row in rows] == list(range(1, len(seen["stock"]["counts"]) + 1))
    for row in rows:
        for group in real["alphas"]:
            expected = row["lr"] * row[f"mols/multiplier/{group}"]
            assert row[f"mols/lr/{group}"] == pytest.approx(expected, rel=1e-6, abs=1e-12), row["update"]
    for group, alpha in real["alphas"].items():
        assert rows[-1][f"mols/alpha/{group}"] == pytest.approx(alpha, rel=1e-6)
        assert rows[-1][f"mols/multiplier/{group}"] == pytest.approx(alpha, rel=1e-6)
    assert {f"mols/snr/{group}" for group in ("vo", "qk", "mlp")} <= set(rows[-1])


EXPECTED = {"waiting": "waiting", "due": "calibrating", "window": "calibrating", "ramp": "ramping", "fixed": "fixed"}


def resume(seen: Seen, part: str) -> None:
    """Bit for bit the uninterrupted run: weights, alphas, rates, phases, logs and what is drawn."""
    whole, resumed = seen["whole"], seen["resumed"]
    saved = whole["saved"][part]
    assert saved["phase"] == EXPECTED[part]
    assert part != "window" or 0 < saved["samples"] < SAMPLES
    for key in ("weights", "alphas", "applied", "samples", "random"):
        assert resumed[key] == whole[key], key
    rest = STEPS - saved["updates"]
    for key in ("lrs", "phases", "logs"):
        assert resumed[key][-rest:] == whole[key][-rest:], key
    updates = [[row[:-1] for row in run["counts"]] for run in (resumed, whole)]  # DeepSpeed saves no micro_steps
    assert updates[0] == updates[1][-rest:]


COLUMNS: dict[str, Callable[[Seen], None]] = {f.__name__: f for f in (attached, counts, schedule, logs)}
COLUMNS |= {part: functools.partial(resume, part=part) for part in SAVED}
"""Columns of the table -> what checks it. The first four read the runs of the part "counts"."""


def check(column: str, ranks: list[Seen]) -> None:
    """What must hold in this column, on each rank. Some clients log on rank 0 alone."""
    for rank, seen in enumerate(ranks):
        if column != "logs" or rank == 0 or seen["real"]["logs"]:
            COLUMNS[column](seen)


def part_of(column: str) -> str:
    """The part whose runs a column reads."""
    return column if column in SAVED else "counts"
