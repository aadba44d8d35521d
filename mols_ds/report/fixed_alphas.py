"""Alphas of one run for another: the "fixed_alphas" of a config, from a report, such as a small model's for a 7B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from mols_ds.core.layout import Granularity, base_group, is_scaled
from mols_ds.core.schema import Report
from mols_ds.errors import MolsConfigError


class FixedAlphas(TypedDict):
    """Keys of a "mols" section."""

    fixed_alphas: dict[str, float]
    granularity: NotRequired[Granularity]


def fixed_alphas(report: Report, groups: Sequence[str] | None = None) -> FixedAlphas:
    """The keys of a "mols" section that give a run the alphas of `report` without a calibration.

    Args:
        report: as `load_report` returns it.
        groups: the groups of the model that will use the alphas; None: they are not checked.

    Returns:
        {"fixed_alphas": {scaled group: alpha}}, with "granularity" where the groups are those of layers.

    Raises:
        MolsConfigError: the report has no alphas, `groups` lacks one of its groups, or it lacks a scaled group of
            `groups`, which would silently keep the base rate.
    """
    rows = {name: group["alpha"] for name, group in report["groups"].items() if is_scaled(name)}
    if report.get("failed"):
        raise MolsConfigError(f"the report holds no alphas: its calibration failed ({report['failed']})")
    alphas = {name: alpha for name, alpha in rows.items() if alpha is not None}
    without = [name for name in rows if name not in alphas]
    if without or not alphas:
        which = f"of {', '.join(without)}" if without else "of any scaled group"
        raise MolsConfigError(f"the report holds no alpha {which}: nothing to hand over")
    layered = granularity_of(report) == "layer_type"
    if groups is not None:
        _check_groups(alphas, [group for group in groups if is_scaled(group)], layered)
    section: FixedAlphas = {"fixed_alphas": alphas}
    if layered:
        section["granularity"] = "layer_type"
    return section


def _check_groups(alphas: Mapping[str, float], known: Sequence[str], layered: bool) -> None:
    here, there = [g for g in alphas if g not in known], [g for g in known if g not in alphas]
    if not here and not there:
        return
    what = f"the report has {_few(here)}, the model has not" if here else f"the model has {_few(there)}, the report not"
    hint = (
        '; alphas of single layers fit a model of the same depth only: measure with "granularity": "type"'
        if layered
        else "; the model's groups come from its rules, give both the same"
    )
    raise MolsConfigError(f"the report's alphas do not fit this model: {what}{hint}")


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def granularity_of(report: Report) -> Granularity:
    """The "granularity" of a report's run: "layer_type" where groups are named by layer, such as "qk.3"."""
    return "layer_type" if any(base_group(name) != name for name in report["groups"]) else "type"
