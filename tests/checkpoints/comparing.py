"""Compare what a run from an old checkpoint gives with what release 0.4.0 gave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FIXTURES = Path(__file__).resolve().parent / "fixtures"
RTOL = 1e-5
"""Relative, of every float but those below. Processors add float32 numbers in different orders, and each order rounds
differently. Runs with other kernels (ATEN_CPU_CAPABILITY=default; MKL_ENABLE_INSTRUCTIONS=SSE4_2) moved them by 1e-6
at most. Adam's eps of 1e-4 keeps the update of a gradient that is zero but for rounding small.
"""
RTOL_INTERVAL = 1e-2
"""Relative, of the ends of a confidence interval: the difference of an estimate and a spread that nearly cancel, from a
few elements. The same runs moved them by 7e-4 at most.
"""
INTERVALS = ("snr_low", "snr_high", "alpha_low", "alpha_high")
ATOL = 1e-9
"""Of floats that are zero, or nearly so."""


def read(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a fixture: `settings.json` or `expected.json`."""
    result: dict[str, Any] = json.loads((FIXTURES / name / file).read_text("utf-8"))
    return result


def merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of those of all ranks: the mean of the losses, and the rest, which must be alike on all ranks."""
    first = ranks[0]
    for other in ranks[1:]:
        for key in first.keys() - {"trace", "warned"}:
            assert first[key] == other[key], key
    trace = []
    for rows in zip(*(rank["trace"] for rank in ranks), strict=True):
        losses = [row["loss"] for row in rows]
        assert all({**row, "loss": 0} == {**rows[0], "loss": 0} for row in rows)
        trace.append({**rows[0], "loss": sum(losses) / len(losses)})
    return {**first, "trace": trace}


def without_intervals(content: Any) -> Any:
    """The content without the ends of intervals, after a check that each interval holds its value.

    For calibrations that this release measured from the first sample on: 0.4.0's intervals had another formula.
    """
    if isinstance(content, Mapping):
        if content.get("snr_low") is not None:
            assert content["snr_low"] <= content["snr"] <= content["snr_high"], content
        return {key: without_intervals(value) for key, value in content.items() if key not in INTERVALS}
    return [without_intervals(value) for value in content] if isinstance(content, list) else content


WEIGHT_SUMS = {"norm", "sum", "wave"}


def weight_sums(weight: torch.Tensor) -> dict[str, float]:
    """Sums of a weight that notice any changed or moved element; computed in float64."""
    flat = weight.detach().double().reshape(-1)
    wave = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    return {"norm": float(flat.norm()), "sum": float(flat.sum()), "wave": float((flat * wave).sum())}


def differences(expected: Any, found: Any, where: str = "", rtol: float = RTOL) -> list[str]:
    """List the differences between `found` and `expected`, with the relative error of floats.

    Whole numbers, texts and truth values are compared exactly, floats to `rtol`. `found` may have more keys. The sums
    of a weight are compared in relation to its norm, since they can be near zero.
    """
    return list(_differences(expected, found, where, rtol))


def _differences(expected: Any, found: Any, where: str, rtol: float) -> Iterator[str]:
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            yield f"{where}: {found!r} is no mapping"
            return
        of_weight = set(expected) == WEIGHT_SUMS
        for key, value in expected.items():
            if key not in found:
                yield f"{where}.{key}: is missing"
            elif key == "versions":  # those of the machine that runs, not of the one that wrote the fixture
                yield from (f"{where}.{key}.{one}: is missing" for one in set(value) - set(found[key]))
            elif of_weight:
                yield from _apart(value, found[key], f"{where}.{key}", rtol, scale=expected["norm"])
            else:
                wide = max(rtol, RTOL_INTERVAL) if key in INTERVALS else rtol
                yield from _differences(value, found[key], f"{where}.{key}", wide)
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        if not isinstance(found, Sequence) or len(found) != len(expected):
            yield f"{where}: {found!r}, expected {len(expected)} entries"
            return
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from _differences(one, other, f"{where}[{number}]", rtol)
    elif isinstance(expected, float) and type(found) in (int, float):
        yield from _apart(expected, found, where, rtol, scale=expected)
    elif type(expected) is not type(found) or expected != found:
        yield f"{where}: {found!r}, expected {expected!r}"


def _apart(expected: float, found: float, where: str, rtol: float, *, scale: float) -> Iterator[str]:
    """A line where the two differ by more than `rtol * |scale|`."""
    error = abs(found - expected)
    if not error <= max(rtol * abs(scale), ATOL):  # "not", for the sake of NaN
        yield f"{where}: {found!r}, expected {expected!r} (off by {error / max(abs(scale), ATOL):.1e})"
