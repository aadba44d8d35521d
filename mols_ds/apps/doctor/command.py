"""`mols-ds doctor`: check the machine, the packages and a config, and name a fix for each finding."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from mols_ds.apps.doctor.findings import Findings, silence
from mols_ds.apps.doctor.imports import try_all
from mols_ds.apps.doctor.machine import GLOO, NCCL, check_machine, check_torch
from mols_ds.apps.doctor.packages import APEX, IMPORTS, check_packages
from mols_ds.errors import MolsConfigError
from mols_ds.training.cli_utils import Parser, integer, run_program

PROGRAM = "mols-ds doctor"
MEGATRON_SUFFIXES = (".yaml", ".yml")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises MolsConfigError for an unknown or invalid argument."""
    parser = Parser(prog=PROGRAM, description="Check this installation and a config.")
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE",
        help="DeepSpeed config (JSON, HJSON or base64) or config of train_megatron.py (YAML)",
    )
    add("--model", metavar="FILE", help="model file or checkpoint folder: checks rules, groups and memory too")
    add("--steps", type=integer(1), metavar="N", help="optimizer steps of the run")
    add(
        "--world",
        type=integer(1),
        metavar="N",
        help="ranks of the run (default: WORLD_SIZE, or what the config implies)",
    )
    add("--out", type=Path, default=Path("runs"), help="folder that the run writes to (default: %(default)s)")
    add("--json", action="store_true", help="findings as JSON")
    add("--strict", action="store_true", help="exit status 1 for warnings too")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the command. Return the exit status; 2 after a one-line user error."""
    return run_program(PROGRAM, lambda: doctor(parse_arguments(argv)))


def doctor(args: argparse.Namespace) -> int:
    """Print the findings. Return 1 if there is a problem (with --strict also for a warning), else 0.

    Raises:
        MolsConfigError: a missing file or an invalid number (exit status 2).
    """
    _check_arguments(args)
    findings, others = Findings(), Findings()
    elements = _examine(others, args)
    with findings.guard("machine"):
        check_machine(findings, args.out, elements)
    findings.items += others.items
    print(findings.as_json(strict=args.strict) if args.json else findings.as_text())
    return findings.status(strict=args.strict)


def _check_arguments(args: argparse.Namespace) -> None:
    if args.model is not None and not Path(args.model).exists():
        raise MolsConfigError(f"--model {args.model}: no such file")
    if args.config is not None and not os.path.exists(args.config):
        from mols_ds.engines.deepspeed.config_reader import read_config

        read_config(args.config)  # base64, or raises: no such file
    elif args.config is not None and not Path(args.config).is_file():
        raise MolsConfigError(f"--config {args.config}: not a regular file (a folder, a pipe or a device)")
    if args.world is None and os.environ.get("WORLD_SIZE", "").isdigit():
        args.world = int(os.environ["WORLD_SIZE"])
    for name in ("steps", "world"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MolsConfigError(f"--{name} {value} is not at least 1")
    if args.model is not None and args.config is not None and args.config.endswith(MEGATRON_SUFFIXES):
        raise MolsConfigError("--model: a Megatron config contains its model; leave --model out")


def _examine(findings: Findings, args: argparse.Namespace) -> int | None:
    """Check the packages, then the config if they work. Return the elements of --model, or None if unknown."""
    there = [name for name in ("transformer_engine", "apex") if importlib.util.find_spec(name) is not None]
    engine = [name for name in IMPORTS if not name.startswith("transformer_engine") or "transformer_engine" in there]
    tried = try_all(["torch", GLOO, NCCL, *engine, *(APEX if "apex" in there else ())])
    check_torch(findings, tried)
    with findings.guard("packages"), silence():
        check_packages(findings, tried)
    config, model = args.config, args.model
    if config is None and model is None:
        return None
    wanted = ["torch", "megatron.core" if config and config.endswith(MEGATRON_SUFFIXES) else "deepspeed"]
    wanted += ["transformers"] if model else []
    if broken := [name for name in wanted if not tried[name].works]:
        found = f"not checked, because {', '.join(broken)} cannot be imported"
        findings.add("problem", "config", found, "fix the import first")
        return None
    with findings.guard("config"):
        return _check_config(findings, args)
    return None


def _check_config(findings: Findings, args: argparse.Namespace) -> int | None:
    if args.config is None:
        from mols_ds.apps.doctor.model import check_model
        from mols_ds.core.config import MolsConfig

        with silence():
            table = check_model(findings, args.model, MolsConfig())
        return None if table is None else sum(table.elements.values())
    if args.config.endswith(MEGATRON_SUFFIXES):
        from mols_ds.apps.doctor.megatron_config import check_yaml

        check_yaml(findings, args.config, steps=args.steps, world=args.world)
        return None
    from mols_ds.apps.doctor.deepspeed_config import check_config

    return check_config(findings, args.config, model=args.model, steps=args.steps, world=args.world)
