"""Check a config of train_megatron.py without a process group: what Megatron-core or this package refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from mols_ds.apps.doctor.findings import Findings, silence
from mols_ds.apps.doctor.schedule import DEFAULT_FIX, RunFacts, check_schedule
from mols_ds.core.config import MolsConfig

if TYPE_CHECKING:
    from mols_ds.training.megatron_settings import Settings

KEYS_FIX = "correct these keys; docs/megatron.md lists all, configs/megatron/ has examples"


def check_yaml(findings: Findings, path: str, *, steps: int | None, world: int | None) -> None:
    """Run all checks of one Megatron config. `steps` replaces run.steps, as --set run.steps=N does."""
    from mols_ds.training import megatron_settings as job

    settings: job.Settings | None = None
    with findings.guard("config.file", KEYS_FIX):
        settings = job.read(path, [f"run.steps={steps}"] if steps is not None else [])
    if settings is None:
        return
    passes = 1
    before = len(findings.items)
    with findings.guard("config.grid", KEYS_FIX), silence():
        passes = _grid(findings, settings, world)
    with findings.guard("config.model", KEYS_FIX), silence():
        _megatron(findings, settings)
    if len(findings.items) == before:
        findings.add("ok", "config.values", f"{path}: read, and accepted by Megatron-core")
    if settings.mols is None:
        found = 'no "mols" section: training is stock Megatron-core'
        findings.add("note", "config.mols", found, "add mols: {} for the defaults (docs/megatron.md)")
        return
    section = MolsConfig.parse(settings.mols)
    with findings.guard("config.schedule", DEFAULT_FIX):
        warmup = round(settings.scheduler.warmup * settings.run.steps)
        power = 32 if settings.precision.dtype == "fp16" else None  # OptimizerConfig.initial_loss_scale: 2 ** 32
        check_schedule(findings, section, RunFacts(settings.run.steps, warmup, settings.batch.total, passes, power))
    if section.rules or section.fixed_alphas or section.factors:
        found = "rules and group names are checked when training starts, before its first step"
        findings.add("note", "config.groups", found)


def _grid(findings: Findings, settings: Settings, world: int | None) -> int:
    """Return the micro-batches per rank and step, for `world` ranks or the smallest number that fits."""
    from mols_ds.training.megatron_config import GridSizes, micro_batches

    parallel = settings.parallel
    least = parallel.pp * max(parallel.tp * parallel.cp, parallel.ep * (parallel.etp or parallel.tp))
    grid = GridSizes.of(settings, world or least)
    passes = micro_batches(settings, grid)
    where = f"{grid.world} ranks" + ("" if world else " (the smallest number; --world N checks others)")
    findings.add("ok", "config.grid", f"{where}, {grid.data} of them data-parallel, {passes} micro-batches per step")
    return passes


def _megatron(findings: Findings, settings: Settings) -> None:
    from megatron_patches.precision import check, optimizer_refusals
    from mols_ds.training.megatron_config import ddp_config, optimizer_config, transformer_config

    optimizer = optimizer_config(settings)
    layout = ddp_config(settings)
    check(transformer_config(settings), optimizer)
    if settings.mols is None:
        return
    adam, section = settings.optimizer.name == "adam", MolsConfig.parse(settings.mols)
    group = {"params": [], "weight_decay": settings.optimizer.weight_decay}
    group |= (
        {"betas": settings.optimizer.betas, "decoupled_weight_decay": optimizer.decoupled_weight_decay} if adam else {}
    )
    kind = {"__module__": "torch.optim", "param_groups": [group], "step": None}
    stand_in = SimpleNamespace(
        config=optimizer, ddp_config=layout, optimizer=type("Adam" if adam else "SGD", (), kind)()
    )
    unscaled = section.weight_decay == "unscaled"
    for refusal in optimizer_refusals(stand_in, section.measures, fused=True, unscaled=unscaled):
        if refusal.applies:
            findings.add("problem", "config.optimizer", f"MoLS does not support {refusal.what}", refusal.way_out)
