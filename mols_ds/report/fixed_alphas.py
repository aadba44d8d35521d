"""Reuse the alphas of a report: return "fixed_alphas" for the config of another run, such as a larger model's."""

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
    """Return the keys of a "mols" section that apply the alphas of `report` without a calibration.

    Args:
        report: from `load_report`.
        groups: groups of the model that will use the alphas; None: no check.

    Returns:
        {"fixed_alphas": {scaled group: alpha}}, with "granularity" if the groups are per layer.

    Raises:
        MolsConfigError: the report has no alphas, or its scaled groups and those of `groups` differ; a missing group
            would silently keep the base rate.
    """
    rows = {name: group["alpha"] for name, group in report["groups"].items() if is_scaled(name)}
    if report.get("failed"):
        raise MolsConfigError(f"the report has no alphas: its calibration failed ({report['failed']})")
    alphas = {name: alpha for name, alpha in rows.items() if alpha is not None}
    without = [name for name in rows if name not in alphas]
    if without or not alphas:
        which = f"of {', '.join(without)}" if without else "of any scaled group"
        raise MolsConfigError(f"the report has no alpha {which}: nothing to reuse")
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
    what = f"the model lacks {_few(here)} of the report" if here else f"the report lacks {_few(there)} of the model"
    hint = (
        '; alphas of single layers fit only a model of the same depth: measure with "granularity": "type"'
        if layered
        else "; groups depend on the rules: use the same rules for both"
    )
    raise MolsConfigError(f"the report's alphas do not fit this model: {what}{hint}")


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def granularity_of(report: Report) -> Granularity:
    """Return the "granularity" of a report's run: "layer_type" if groups have layer numbers, such as "qk.3"."""
    return "layer_type" if any(base_group(name) != name for name in report["groups"]) else "type"
