"""Checks of a model file with a "mols" section: rules, groups, fused parameters, memory of the accumulators."""

from __future__ import annotations

from mols_ds.apps.doctor.findings import Findings
from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.groups import GroupTable, group_table
from mols_ds.core.phases import Schedule
from mols_ds.core.protocols import Context
from mols_ds.errors import MolsError

GIB = 2**30
ACCUMULATOR_BYTES = 8
"""Bytes per owned element during a calibration (`mols_ds.core.accumulators`), and a few MiB that do not matter here."""


def check_model(findings: Findings, source: str, config: MolsConfig) -> GroupTable | None:
    """Build the group table of a model file without its weights. Return None (and add a finding) if rules do not fit.

    Raises:
        MolsConfigError: the model file itself is invalid.
    """
    import torch

    from mols_ds.training.models import meta_model

    model = meta_model(source)
    try:
        table = group_table(model, config.rules, config.granularity)
        context = Context(lambda sums: sums, torch.device("cpu"), 0, {}, {}, log=lambda _: None)
        Controller(config, table, [], Schedule(0, 1), context)
    except MolsError as error:
        findings.refused("config.groups", error, "mols-ds groups MODEL --parameters shows the names and groups")
        return None
    shares = ", ".join(f"{row.group} {row.share:.1%}" for row in table[:8]) + (", ..." if len(table) > 8 else "")
    findings.add("ok", "config.groups", f"{len(table)} groups: {shares}")
    fused = [name for name, layout in table.layouts.items() if len(layout.groups) > 1]
    if fused:
        found = f"{len(fused)} fused parameters hold several groups ({fused[0]}, ...): scaled by ranges"
        findings.add("note", "config.fused", found, "under AutoTP each must be split into contiguous rows")
    return table


def check_memory(findings: Findings, config: MolsConfig, table: GroupTable, world: int) -> None:
    """Check whether the accumulators of one of `world` ranks fit into the memory of their device."""
    import psutil  # type: ignore[import-untyped]
    import torch

    if config.fixed_alphas is not None or config.mode == "moments":
        findings.add("ok", "config.accumulators", "none are needed")
        return
    need = sum(table.elements.values()) / world * ACCUMULATOR_BYTES
    found = f"{need / GIB:,.2f} GiB of accumulators per rank during the calibration"
    if config.accumulators.device == "accelerator" and torch.cuda.is_available():
        free, where = torch.cuda.mem_get_info()[0], "free on the device before the model is loaded"
        fix = '"accumulators": {"device": "cpu"}, which uses no device memory'
        tight = need > free / 4
    else:
        ranks = min(world, max(torch.cuda.device_count(), 1))
        free, where = psutil.virtual_memory().available, f"available on this host, for {ranks} ranks"
        fix = 'more ranks, mode "moments" (no accumulators), or fixed_alphas of a smaller model'
        tight = need * ranks > free
    found += f"; {free / GIB:,.1f} GiB are {where}"
    findings.add("warning" if tight else "ok", "config.accumulators", found, fix if tight else "")
