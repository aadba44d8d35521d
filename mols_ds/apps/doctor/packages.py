"""Checks of packages: DeepSpeed and its kernels, Megatron-core, Transformer Engine, apex, optional packages."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mols_ds.apps.doctor.findings import Findings, silence
from mols_ds.apps.doctor.imports import Tried
from mols_ds.engines.deepspeed.compat import TESTED as DEEPSPEED_TESTED
from mols_ds.engines.deepspeed.compat import module as deepspeed_module

if TYPE_CHECKING:
    from packaging.requirements import Requirement

ENGINE = "transformer_engine.pytorch"
IMPORTS = (
    *("deepspeed", "megatron.core", ENGINE, "transformers", "datasets", "tokenizers", "tensorboard", "matplotlib"),
    *("rich", "peft", "bitsandbytes", "pytorch_optimizer"),
)
"""Modules to import, in a separate process. `lm_eval` is not imported."""
APEX = ("amp_C", "apex.optimizers")
"""Modules that `find_apex` imports, tried first in a separate process."""
APEX_FIX = (
    "pip uninstall apex, then build NVIDIA's from github.com/NVIDIA/apex (with --cpp_ext and --cuda_ext); or leave it "
    "out: Megatron-core then uses Transformer Engine's FusedAdam or torch's AdamW"
)


def check_packages(findings: Findings, tried: Mapping[str, Tried]) -> None:
    """Check every package. `tried`: results of importing the installed ones of `IMPORTS`."""
    with findings.guard("requirements"):
        _requirements(findings, tried)
    if not tried["torch"].works:
        return
    with findings.guard("deepspeed", "pip install deepspeed==" + DEEPSPEED_TESTED):
        _deepspeed(findings, tried["deepspeed"])
    with findings.guard("megatron"):
        _megatron(findings, tried["megatron.core"])
    with findings.guard("transformer_engine", level="warning"):
        _transformer_engine(findings, tried.get(ENGINE))
    with findings.guard("apex", APEX_FIX, level="warning"):
        _apex(findings, tried)
    with findings.guard("fp8", level="warning"):
        _low_precision(findings)
    with findings.guard("optimizers", level="warning"):
        _optimizers(findings, tried)


# ------------------------------------------------------------------ requirements of our own metadata


def _module(distribution: str) -> str:
    return {"PyYAML": "yaml", "megatron-core": "megatron.core"}.get(distribution, distribution.replace("-", "_"))


def _requirements(findings: Findings, tried: Mapping[str, Tried]) -> None:
    """Check the installed versions against the package's requirements, per extra, and whether each imports."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("mols-ds") or []
    except metadata.PackageNotFoundError:
        found = "mols-ds is not installed, it runs from a folder"
        findings.add("note", "requirements", found, "pip install -e . in that folder")
        return
    extras: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        named = re.search(r"extra == ['\"](\w+)['\"]", str(requirement.marker or ""))
        extras.setdefault(named[1] if named else "", []).append(requirement)
    for extra in sorted(set(extras) - {"dev", "docs"}):
        _extra(findings, extra, extras[extra], tried)


def _extra(findings: Findings, extra: str, wanted: list[Requirement], tried: Mapping[str, Tried]) -> None:
    name = f"requirements.{extra or 'base'}"
    there, missing, broken, again = [], [], [], []
    for requirement in wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement)
            continue
        result = tried.get(_module(requirement.name))
        if not requirement.specifier.contains(version, prereleases=True):
            broken.append(f"{requirement.name} {version} is not {requirement.specifier}")
            again.append(requirement)
        elif result is not None and not result.works:
            broken.append(f"{requirement.name} {version} cannot be imported ({result.error})")
            again.append(requirement)
        else:
            there.append(f"{requirement.name} {version}")
    if broken:
        findings.add("problem" if not extra else "warning", name, "; ".join(broken), _install(again))
    if missing:
        found = f"not installed: {', '.join(requirement.name for requirement in missing)}"
        findings.add("note" if extra else "problem", name, found, _install(missing))
    if not broken and not missing:
        findings.add("ok", name, ", ".join(there))


def _install(wanted: list[Requirement]) -> str:
    """Return the pip command for these packages: their names, not an extra, because mols-ds is not on PyPI."""
    return "pip install --upgrade " + " ".join(f"'{package.name}{package.specifier}'" for package in wanted)


# ------------------------------------------------------------------ engines


def _deepspeed(findings: Findings, tried: Tried) -> None:
    if not tried.works:
        raise ImportError(tried.error)
    if tried.version.split("+")[0] == DEEPSPEED_TESTED:
        findings.add("ok", "deepspeed", f"DeepSpeed {tried.version}, the tested version")
    else:
        found = f"DeepSpeed {tried.version}; tested with {DEEPSPEED_TESTED}"
        findings.add("warning", "deepspeed", found, f"pip install deepspeed=={DEEPSPEED_TESTED}, or run the tests")
    with findings.guard("deepspeed.ops", level="warning"), silence():
        _ops(findings)


def _ops(findings: Findings) -> None:
    """Report kernels that are prebuilt, compiled before, or to be compiled at first use."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    report = deepspeed_module("deepspeed.env_report")  # as `ds_report` prints
    kernels = report.ALL_OPS
    root = Path(cpp_extension.get_default_build_root())
    compiled = {file.stem for file in root.glob("**/*.so")} | {
        name for name, built in report.installed_ops.items() if built
    }
    compiled &= set(kernels)
    real = {name: builder for name, builder in kernels.items() if "not_implemented" not in name}
    able = [name for name, builder in real.items() if report.probe_is_compatible(builder, False)]
    unable = [name for name in real if name not in able]
    accelerator = get_accelerator().device_name()
    lists = (("can be compiled", able), ("cannot", unable), ("compiled already", sorted(compiled)))
    found = "; ".join(f"{what}: {', '.join(names) or 'none'}" for what, names in lists)
    fix = "--config checks whether a config needs one that cannot be compiled" if unable else ""
    findings.add("ok" if able else "note", "deepspeed.ops", f"on {accelerator}, {found}", fix)
    if accelerator == "cuda" and torch.version.hip is None:
        version = report.nvcc_version()
        if "FAIL" in version:
            fix = "install the CUDA toolkit of torch's version and set CUDA_HOME"
            findings.add("warning", "deepspeed.nvcc", "no CUDA toolkit (nvcc): no kernel can be compiled", fix)
        else:
            findings.add("ok", "deepspeed.nvcc", f"nvcc {version}")
    for lock in sorted(root.glob("**/lock")):
        found = f"{lock}: a compilation is running, or one was killed; the next use waits for it"
        findings.add("warning", "deepspeed.lock", found, "delete it if nothing is compiling")


def _megatron(findings: Findings, tried: Tried) -> None:
    if importlib.util.find_spec("megatron") is None:
        findings.add(
            "note", "megatron", "megatron-core is not installed", "if needed: pip install 'megatron-core>=0.16'"
        )
        return
    if not tried.works:
        findings.add("problem", "megatron", f"megatron-core cannot be imported: {tried.error}", "reinstall it")
        return
    from megatron_patches.compat import check_version, tested

    check_version(force=False)
    findings.add("ok", "megatron", f"megatron-core {tried.version} (tested: {tested()})")


def _transformer_engine(findings: Findings, tried: Tried | None) -> None:
    if tried is None:
        found = "Transformer Engine is not installed: no FP8, FP4 or context parallelism with Megatron"
        findings.add("note", "transformer_engine", found, "on Hopper or newer: pip install transformer_engine[pytorch]")
    elif not tried.works:
        found = f"Transformer Engine is installed but cannot be imported: {tried.error}"
        fix = "install a build for this torch and CUDA (docs.nvidia.com/deeplearning/transformer-engine), or remove it"
        findings.add("warning", "transformer_engine", found, fix)
    else:
        from megatron_patches.machine import find_transformer_engine

        version, why = find_transformer_engine()
        if version is None:
            findings.add("warning", "transformer_engine", why, "pip uninstall transformer_engine, then NVIDIA's")
        else:
            findings.add("ok", "transformer_engine", f"Transformer Engine {version}")


def _apex(findings: Findings, tried: Mapping[str, Tried]) -> None:
    from megatron_patches.machine import find_apex

    if importlib.util.find_spec("apex") is None:
        findings.add("note", "apex", "NVIDIA apex is not installed (Megatron-core then uses another Adam)")
        return
    crashes = [tried[name].error for name in APEX if name in tried and tried[name].error.startswith("it ")]
    usable, why = (False, f"apex cannot be imported: {crashes[0]}") if crashes else find_apex()
    if usable:
        findings.add("ok", "apex", "NVIDIA apex with its FusedAdam")
        return
    try:
        version = metadata.version("apex")
        why += f"; the distribution is apex {version}" + (", PyPI's" if version.startswith("0.9") else "")
    except metadata.PackageNotFoundError:
        why += "; no distribution owns it: a folder called apex on the path?"
    findings.add("warning", "apex", why, APEX_FIX)


def _low_precision(findings: Findings) -> None:
    from megatron_patches.machine import RECIPES, device_capability

    capability = device_capability()
    if capability is None:
        findings.add("note", "fp8", "no CUDA device: no FP8 or FP4 (they need capability 8.9 or newer)")
        return
    able = [name for name, recipe in RECIPES.items() if recipe.capability <= capability and name != "custom"]
    now = ".".join(map(str, capability))
    findings.add("ok" if able else "note", "fp8", f"capability {now}: recipes {', '.join(able) or 'none'}")


def _optimizers(findings: Findings, tried: Mapping[str, Tried]) -> None:
    """Report the optimizers whose package is missing or broken."""
    from mols_ds.optim.catalog import OPTIMIZERS

    packages: dict[str, list[str]] = {}
    for entry in OPTIMIZERS.values():
        packages.setdefault(entry.package, []).append(entry.name)
    for package, names in packages.items():
        result = tried.get(_module(package)) if package else None
        if not package or (result is not None and result.works):
            findings.add("ok", f"optimizers.{package or 'own'}", ", ".join(names))
            continue
        absent = importlib.util.find_spec(_module(package)) is None
        found = f"{package} is not installed" if absent else f"{package} cannot be imported: {result and result.error}"
        findings.add(
            "note" if absent else "warning",
            f"optimizers.{package}",
            f"{found}: no {', '.join(names)}",
            f"pip install {package}",
        )
