"""The tables of `convergence`: paired differences with their intervals, and markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mols_ds.estimators import t_quantile

Results = Mapping[str, Mapping[float, Mapping[int, Mapping[str, Any]]]]
"""Finished runs: arm -> base rate -> seed -> result."""


def summarise(results: Results, base: str, tuned_on: int) -> list[dict[str, Any]]:
    """One row an arm, at the rate that did best with the seed `tuned_on`, compared in pairs with the arm `base`.

    Runs that diverged are left out of means and differences, and counted.
    """
    tuned = {a: {rate: seeds[tuned_on] for rate, seeds in by.items() if tuned_on in seeds} for a, by in results.items()}
    best = {arm: min(by, key=lambda rate: loss(by[rate])) for arm, by in tuned.items() if by}
    rows = []
    for arm, rate in best.items():
        rates = sorted(tuned[arm])
        runs = results[arm][rate]
        losses = {seed: loss(run) for seed, run in runs.items() if math.isfinite(loss(run))}
        theirs = {} if arm == base or base not in best else results[base][best[base]]
        pairs = {seed: value - loss(theirs[seed]) for seed, value in losses.items() if seed in theirs}
        groups = sorted({group for run in runs.values() for group in run["alphas"]})
        rows.append(
            {
                "arm": arm,
                "rate": rate,
                "at_edge": len(rates) > 1 and rate in (rates[0], rates[-1]),
                "grid": {f"{r:g}": tuned[arm][r]["val_loss"] for r in rates},
                "losses": losses,
                "diverged": len(runs) - len(losses),
                "mean": statistics.fmean(losses.values()) if losses else None,
                "sd": statistics.stdev(losses.values()) if len(losses) > 1 else None,
                "difference": interval(list(pairs.values())),
                "difference_unseen": interval([d for seed, d in pairs.items() if seed != tuned_on]),
                "alphas": {g: statistics.fmean(run["alphas"].get(g, 1.0) for run in runs.values()) for g in groups},
                "failed": sum("failed" in run["report"] for run in runs.values()),
                "clamped": sorted({g for run in runs.values() for g in clamped(run["report"])}),
            }
        )
    return rows


def loss(run: Mapping[str, Any]) -> float:
    """Final validation loss; infinite where the run diverged."""
    return math.inf if run["val_loss"] is None else float(run["val_loss"])


def clamped(report: Mapping[str, Any]) -> list[str]:
    """Groups whose alpha was held at a bound."""
    return [group for group, row in report.get("groups", {}).items() if row.get("clamped")]


def interval(differences: Sequence[float]) -> dict[str, float] | None:
    """Mean of paired differences with the half-width of its 95 % t-interval; None for fewer than two pairs."""
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "mean": statistics.fmean(differences),
        "half": t_quantile(len(differences) - 1) * error,
        "pairs": len(differences),
    }


def markdown(rows: Sequence[dict[str, Any]], seeds: Sequence[int], tuned_on: int) -> str:
    """Both tables."""
    rates = sorted({float(rate) for row in rows for rate in row["grid"]})
    groups = [g for g in ("embedding", "head", "qk", "vo", "mlp") if any(g in row["alphas"] for row in rows)]
    lines = [
        f"Final validation loss at each arm's best rate, seeds {', '.join(map(str, seeds))}:",
        "",
        "| arm | rate | mean | sd | minus Adam, 95 % interval | without the seed of the grid | "
        + " | ".join(f"α {g}" for g in groups)
        + " |",
        "|---" * (6 + len(groups)) + "|",
    ]
    for row in rows:
        edge = " (edge)" if row["at_edge"] else ""
        note = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        note += f" ({row['failed']} calibrations failed)" if row["failed"] else ""
        short = f" ({count} seeds)" if (count := len(row["losses"]) + row["diverged"]) < len(seeds) else ""
        cells = [row["arm"], f"{row['rate']:g}{edge}", number(row["mean"]) + note + short, number(row["sd"])]
        cells += [spread(row["difference"]), spread(row["difference_unseen"])]
        cells += [f"{row['alphas'][g]:.3g}{'*' * (g in row['clamped'])}" if g in row["alphas"] else "" for g in groups]
        lines.append("| " + " | ".join(cells) + " |")
    if any(row["clamped"] for row in rows):
        lines += ["", "`*`: at a bound in at least one run."]
    lines += ["", f"Grid of base rates, seed {tuned_on}:", "", "| arm | " + " | ".join(f"{r:g}" for r in rates) + " |"]
    lines.append("|---" * (1 + len(rates)) + "|")
    for row in rows:
        cells = [number(row["grid"][f"{r:g}"], "diverged") if f"{r:g}" in row["grid"] else "" for r in rates]
        lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def number(value: float | None, missing: str = "") -> str:
    """Four decimals."""
    return missing if value is None else f"{value:.4f}"


def spread(value: dict[str, float] | None) -> str:
    """Mean and interval; bold where the interval leaves zero out."""
    if value is None:
        return ""
    mean, half = value["mean"], value["half"]
    text = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
    return f"**{text}**" if abs(mean) > half else text
