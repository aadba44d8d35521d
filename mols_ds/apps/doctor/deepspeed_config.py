"""Check a DeepSpeed config without an engine. Report what this package or DeepSpeed refuses, and what may train
differently than intended. Each check calls the code that raises, with a stand-in for the engine."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mols_ds.apps.doctor.findings import Findings, last_line, silence
from mols_ds.apps.doctor.model import check_memory, check_model
from mols_ds.apps.doctor.schedule import DEFAULT_FIX, RunFacts, check_schedule
from mols_ds.apps.doctor.stand_in import engine_stand_in
from mols_ds.core.config import MolsConfig
from mols_ds.core.files import read_text
from mols_ds.core.json_text import parse_json
from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.engines.deepspeed.compat import module as deepspeed_module
from mols_ds.engines.deepspeed.config_keys import misspelt_keys
from mols_ds.engines.deepspeed.config_reader import config_name
from mols_ds.errors import MolsConfigError, MolsError

if TYPE_CHECKING:
    from torch.optim import Optimizer

TRIED_STEPS = 64
"""Steps to try with a scheduler: does it keep the rates of the groups and the betas?"""
OWN_WARMUP = 0.10
"""Warm-up share of train.py's own schedule, if the config has none (`mols_ds.training.batches`; METHOD: 10 %)."""
KEYS_FIX = "correct these keys; docs/config.md lists those of MoLS, deepspeed.ai/docs/config-json the others"


def check_config(
    findings: Findings, path: str, *, model: str | None, steps: int | None, world: int | None
) -> int | None:
    """Run all checks of one DeepSpeed config. Return the elements of `model`, or None without a valid model."""
    from mols_ds.training.ds_config import check_with_deepspeed, read_config, resolve

    before = len(findings.items)
    config: JsonObject = {}
    resolved: JsonObject | None = None
    with findings.guard("config.file", KEYS_FIX), silence():
        config = read_config(path)
    if not config:
        if len(findings.items) == before:
            findings.add("problem", "config.file", f"{config_name(path)} is empty", "see configs/ for one")
        return None
    for key, near in misspelt_keys(config).items():
        found = f'DeepSpeed does not know the key "{key}" and ignores it'
        findings.add("warning", "config.keys", found, f'did you mean "{near}"?')
    _plain_json(findings, path)
    with findings.guard("config.auto"), silence():
        _auto(findings, config)
    section = MolsConfig.parse(config["mols"]) if config.get("mols") is not None else None
    ranks = world or _ranks_meant(config)
    with findings.guard("config.values", KEYS_FIX), silence():
        resolved = resolve(config, world=ranks, steps=steps or 1, out=Path("runs"))
    if resolved is not None:
        with findings.guard("config.deepspeed", KEYS_FIX), silence():
            # DeepSpeed multiplies by the world size of this process, which is 1
            share = resolved["train_batch_size"] // ranks
            check_with_deepspeed({**resolved, "train_batch_size": share}, path)
    if not any(item.level == "problem" for item in findings.items[before:]):
        findings.add("ok", "config.values", f"{config_name(path)}: read, and accepted by DeepSpeed for {ranks} ranks")
    if section is None:
        found = 'no "mols" section: training is stock DeepSpeed'
        findings.add("note", "config.mols", found, 'add "mols": {} for the defaults (docs/config.md)')
    total, warmup = steps, None
    with findings.guard("config.scheduler"), silence():
        total, warmup = _scheduler(findings, config, section, steps)
    if section is not None and resolved is not None:
        with findings.guard("config.schedule", DEFAULT_FIX):
            check_schedule(findings, section, _run(resolved, total, warmup))
        if section.enabled:
            with findings.guard("config.engine"), silence():
                _engine(findings, _as_given(resolved, config), section)
    if resolved is not None:
        with findings.guard("config.kernels", level="warning"), silence():
            _kernels(findings, resolved)
    return _model(findings, model, section or MolsConfig(), ranks)


def _model(findings: Findings, model: str | None, section: MolsConfig, ranks: int) -> int | None:
    if model is None:
        if section.rules or section.fixed_alphas or section.factors or section.granularity != "type":
            found = "rules and group names can be checked only against a model"
            findings.add("note", "config.groups", found, "mols-ds doctor --model FILE")
        return None
    table = None
    with findings.guard("config.groups"), silence():
        table = check_model(findings, model, section)
    if table is None:
        return None
    with findings.guard("config.accumulators", level="warning"):
        check_memory(findings, section, table, ranks)
    return sum(table.elements.values())


def _ranks_meant(config: JsonMapping) -> int:
    """Return the number of ranks that the three batch sizes imply; 1 if they do not determine it."""
    from mols_ds.training.ds_config import BATCH_KEYS

    total, micro, passes = (config.get(key) for key in BATCH_KEYS)
    if all(type(value) is int and value > 0 for value in (total, micro, passes)):
        return max(1, int(total) // (int(micro) * int(passes)))  # type: ignore[arg-type]
    return 1


def _auto(findings: Findings, config: JsonMapping) -> None:
    """Report who fills each "auto": train.py and finetune.py all they accept, a Trainer some, DeepSpeed none."""
    from mols_ds.engines.deepspeed.auto_values import ACCELERATE, DEFAULTED, TRAINER, auto_keys, refused_by_deepspeed

    keys, library = auto_keys(config), _is_library(config)
    filled = [key for key in keys if key in TRAINER]
    left = [key for key in keys if key not in TRAINER + ACCELERATE]
    refused = [key for key in keys if refused_by_deepspeed(key) and not (library and key.startswith("optimizer."))]
    if filled:
        findings.add("ok", "config.auto", f'"auto" that a Trainer fills: {", ".join(filled)}')
    if given := [key for key in keys if key in ACCELERATE]:
        found = f'"auto" that accelerate fills with its own settings, under a Trainer too: {", ".join(given)}'
        findings.add("note", "config.auto", found)
    if left:
        found = f'"auto" that no Trainer fills (accelerate raises ValueError): {", ".join(left)}'
        findings.add("warning", "config.auto", found, "give values, if a Trainer or accelerate reads this config")
    if refused:
        found = 'mols_ds.initialize and deepspeed.initialize cannot take "auto" (TypeError in DeepSpeed)'
        fix = "fine under a Trainer, train.py and finetune.py, which fill it before; elsewhere give values"
        findings.add("warning", "config.auto", f"{found}: {', '.join(refused)}", fix)
    if defaulted := [key for key in keys if key.startswith(DEFAULTED)]:
        found = '"auto" that DeepSpeed itself replaces by its default (fp16 and bf16: off; stage: 0)'
        findings.add("note", "config.auto", f"{found}: {', '.join(defaulted)}")


def _is_library(config: JsonMapping) -> bool:
    """Return True if this package builds the optimizer: "auto" then means its default."""
    from mols_ds.optim.build import requested

    with contextlib.suppress(MolsError):  # the finding "config.values" reports it
        return requested(config.get("optimizer")) is not None
    return False


def _plain_json(findings: Findings, given: str) -> None:
    """Add a note if DeepSpeed can read the file, but clients that need plain JSON cannot."""
    if not os.path.isfile(given):
        return
    try:
        parse_json(read_text(given, ""), "")
    except MolsConfigError:
        found = "the file is HJSON (comments, trailing commas), which transformers' Trainer and accelerate do not read"
        findings.add("note", "config.file", found, "give them plain JSON, or a dict")


# ------------------------------------------------------------------ the scheduler


def _scheduler(
    findings: Findings, config: JsonMapping, section: MolsConfig | None, steps: int | None
) -> tuple[int | None, int | None]:
    """Return (steps, warm-up) of the run. Build the scheduler on a stand-in and step it."""
    named = config.get("scheduler")
    if not isinstance(named, Mapping) or not named.get("type"):
        warmup = None if steps is None else round(OWN_WARMUP * steps)
        findings.add(
            "ok",
            "config.scheduler",
            "none in the config: train.py warms up over 10 % and decays by a cosine; for another loop, pass its "
            "scheduler to initialize",
        )
        return steps, warmup
    import torch

    from mols_ds.optim.scheduler_hints import scheduler_hints

    lr_schedules = deepspeed_module("deepspeed.runtime.lr_schedules")
    name = str(named["type"])
    if not hasattr(lr_schedules, name):
        _not_deepspeeds(findings, name, config)
        return steps, None
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": lr} for w, lr in zip(weights, (1e-3, 2e-3), strict=True)])
    try:
        scheduler = getattr(lr_schedules, name)(optimizer, **(named.get("params") or {}))
    except Exception as error:  # DeepSpeed's schedulers check little; any type can come from where a value is used
        fix = f'correct "scheduler.params": arguments of deepspeed.runtime.lr_schedules.{name}'
        findings.add("problem", "config.scheduler", f"{name} refuses its params: {last_line(error)}", fix)
        return steps, None
    _step_it(findings, name, scheduler.step, optimizer, section)
    total, warmup = scheduler_hints(scheduler)
    if total is not None and steps is not None and total != steps:
        found = f"{name} has {total} steps, but the run has {steps}"
        findings.add("warning", "config.scheduler", found, f'"scheduler.params.total_num_steps": {steps}')
    return (steps if steps is not None else total), warmup


def _not_deepspeeds(findings: Findings, name: str, config: JsonMapping) -> None:
    import torch

    from mols_ds.optim.build import zero_stage

    known = ", ".join(deepspeed_module("deepspeed.runtime.lr_schedules").VALID_LR_SCHEDULES)
    if not hasattr(torch.optim.lr_scheduler, name):
        findings.add("problem", "config.scheduler", f'"scheduler.type" {name!r} is unknown', f"one of {known}")
    elif zero_stage(config) > 0:
        found = f"{name} is torch's, and torch's schedulers refuse ZeRO's optimizers"
        fix = f"one of {known}; or pass lr_scheduler=lambda optimizer: {name}(...) to initialize"
        findings.add("problem", "config.scheduler", found, fix)


def _step_it(
    findings: Findings, name: str, step: Callable[[], object], optimizer: Optimizer, section: MolsConfig | None
) -> None:
    betas = [group["betas"] for group in optimizer.param_groups]
    flattened = True
    for _ in range(TRIED_STEPS):
        step()
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not all(map(math.isfinite, rates)):
            findings.add("problem", "config.scheduler", f"{name} gives rates {rates}", 'correct "scheduler.params"')
            return
        flattened &= rates[0] == rates[1]
    before = len(findings.items)
    if name == "LRRangeTest":
        found = "LRRangeTest raises the rate to find its limit; a ramp of multipliers on top would blur the result"
        findings.add("warning", "config.scheduler", found, '"mols": {"enabled": false} for a range test')
    if flattened:
        found = f"{name} gives all parameter groups the same rate, even if you set different ones"
        fix = "multipliers are applied on top and stay; for different rates use WarmupCosineLR or your own scheduler"
        findings.add("note", "config.scheduler", found, fix)
    if [group["betas"] for group in optimizer.param_groups] != betas:
        moments = section is not None and section.mode == "moments"
        findings.add(
            "warning" if moments else "note",
            "config.scheduler",
            f"{name} changes Adam's beta1 at every step"
            + (', but mode "moments" assumes a constant beta1' if moments else "; this works with MoLS"),
            '"cycle_momentum": false, or "mode": "probe"' if moments else "",
        )
    if len(findings.items) == before:
        findings.add("ok", "config.scheduler", f"{name} works with MoLS: multipliers never enter its state")


def _run(resolved: JsonMapping, steps: int | None, warmup: int | None) -> RunFacts:
    half = resolved.get("fp16") or {}
    dynamic = half.get("enabled") is True and not half.get("loss_scale")
    return RunFacts(
        steps=steps,
        warmup=warmup,
        sequences=resolved["train_batch_size"],
        passes=resolved["gradient_accumulation_steps"],
        fp16_scale_power=int(half.get("initial_scale_power", 16)) if dynamic else None,
    )


# ------------------------------------------------------------------ refusals of attach


def _as_given(resolved: JsonMapping, config: JsonMapping) -> JsonMapping:
    """Return `resolved` with DeepSpeed's optimizer where the programs take the library's because this is a CPU: other
    loops and machines do not."""
    given = config.get("optimizer")
    if not isinstance(given, Mapping) or "source" in given:
        return resolved
    optimizer = {key: value for key, value in resolved["optimizer"].items() if key != "source"}
    return {**resolved, "optimizer": {**optimizer, "type": given["type"]}}


def _engine(findings: Findings, resolved: JsonMapping, section: MolsConfig) -> None:
    """Report the refusals of `mols_ds.attach`, on a stand-in for this config's engine."""
    from mols_ds.engines.deepspeed.checks import _engine_refusals, _optimizer_refusals

    stand_in = engine_stand_in(resolved)
    refusals = [*_engine_refusals(stand_in, section), *_optimizer_refusals(stand_in, section)]
    for applies, what, way_out in refusals:
        if applies:
            findings.add("problem", "config.engine", f"MoLS does not support {what}", way_out)


# ------------------------------------------------------------------ kernels


def _kernels(findings: Findings, config: JsonMapping) -> None:
    """Report which kernels DeepSpeed compiles for this config, and whether it can compile them here."""
    from deepspeed.accelerator import get_accelerator

    kernels = deepspeed_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    for kernel, why, way_out in _needed(config, get_accelerator().device_name()):
        builder = kernels.get(kernel)
        if builder is None or not builder.is_compatible(verbose=False):
            found = f"{why} needs DeepSpeed's kernel {kernel}, which cannot be compiled here"
            findings.add("problem", "config.kernels", found, way_out)
        else:
            found = f"{why} needs DeepSpeed's kernel {kernel}, which is compiled at first use (minutes)"
            findings.add("note", "config.kernels", found, f"compile it before (see ds_report); or {way_out}")


def _needed(config: JsonMapping, device: str) -> list[tuple[str, str, str]]:
    """Return (kernel, what needs it, alternative) for each kernel of this config."""
    from mols_ds.optim.build import offload_device, requested

    section = config["optimizer"]
    place, name = offload_device(config), section["type"].lower()
    needed = []
    ours = requested(section) is not None
    plain = (section.get("params") or {}).get("torch_adam") is True
    if place == "nvme":
        needed.append(("async_io", "offload to NVMe", 'install libaio-dev, or "offload_optimizer.device": "cpu"'))
    if ours:
        return needed
    if place is not None and name in ("adam", "adamw") and config.get("zero_force_ds_cpu_optimizer", True):
        way_out = 'set "zero_force_ds_cpu_optimizer": false and "torch_adam": true'
        needed.append(("cpu_adam", "Adam with offload", way_out))
    elif place is None and name in ("adam", "adamw") and not plain:
        needed.append(("fused_adam", f"Adam on {device}", 'set "optimizer.params.torch_adam": true'))
    return needed
