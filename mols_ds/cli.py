"""The command `mols-ds`: start a job, run a study, show a model's module groups, show a report, copy configs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mols_ds import __version__
from mols_ds.apps.launch.jobs import JOBS, start_job
from mols_ds.errors import MolsConfigError, printable_lines
from mols_ds.training.cli_utils import Parser, run_program

if TYPE_CHECKING:
    from mols_ds.core.schema import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mols-ds` on `argv` (default: the command line). Returns its status: 2 for a user's mistake, stated in one
    line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"mols-ds {__version__}")
        return 0
    if arguments[:1] and arguments[0] in JOBS:
        return run_program(f"mols-ds {arguments[0]}", lambda: start_job(arguments[0], arguments[1:]))
    if arguments[:1] == ["launch"]:
        from mols_ds.apps.launch.deepspeed_cli import main as launch

        return launch(arguments[1:])
    if arguments[:1] == ["doctor"]:  # before anything is imported that may be broken
        from mols_ds.apps.doctor.command import main as examine

        return examine(arguments[1:])
    return run_program("mols-ds", lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    args = _parser().parse_args(arguments)
    if arguments[0] == "compare":
        from mols_ds.apps.study.command import compare

        return compare(args)
    if arguments[0] == "plan":
        from mols_ds.apps.plan.command import plan

        return plan(args)
    print(printable_lines(args.text(args)))
    return 0


def _parser() -> argparse.ArgumentParser:
    from mols_ds.apps.plan.command import add_arguments as add_plan
    from mols_ds.apps.study.command import add_arguments
    from mols_ds.report.export import FRAMEWORKS

    parser = Parser(prog="mols-ds", description="MoLS: module-wise learning rates from the gradients' SNR.")
    parser.add_argument("--version", action="version", version=f"mols-ds {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for job, (_, does) in JOBS.items():
        commands.add_parser(job, help=f"{does}; --nproc N: processes", add_help=False)
    launch = "start a script as DeepSpeed's launcher does: mols-ds launch --config FILE train.py ..."
    commands.add_parser("launch", help=launch, add_help=False)
    study = "train every arm of a study, tuned alike and over seeds, and write the report"
    add_arguments(commands.add_parser("compare", help=study))
    planned = "what a run will need: memory of each rank, messages, time, and the nearest setting that fits"
    add_plan(commands.add_parser("plan", help=planned))
    doctor = "what is installed and usable, and what is wrong with a config: mols-ds doctor --config FILE ..."
    commands.add_parser("doctor", help=doctor, add_help=False)
    groups = commands.add_parser("groups", help="the module groups of a model, without building its weights")
    groups.add_argument("model", help="model file (configs/models/*.json) or transformers checkpoint folder")
    groups.add_argument(
        "--config", metavar="FILE", help='DeepSpeed config whose "mols" section has rules or granularity'
    )
    groups.add_argument("--parameters", action="store_true", help="the groups of each parameter too")
    groups.set_defaults(text=groups_text)
    report = commands.add_parser("report", help="the content of a mols_report.json")
    report.add_argument("report", help="mols_report.json or its folder")
    report.add_argument("--fixed-alphas", action="store_true", help='its alphas as keys of a "mols" section, in JSON')
    report.add_argument(
        "--to", metavar="FRAMEWORK", choices=FRAMEWORKS, help=f"its alphas as configuration of {', '.join(FRAMEWORKS)}"
    )
    report.add_argument("--model", metavar="FILE", help="the model that will use them: checked against, its names used")
    report.set_defaults(text=report_text)
    configs = commands.add_parser("configs", help="list or copy the configs, studies, launch files and examples")
    configs.add_argument("patterns", nargs="*", metavar="PATTERN", help="such as configs/models or 'configs/ds_7b*'")
    configs.add_argument("--copy", type=Path, metavar="FOLDER", help="copy them there")
    configs.set_defaults(text=configs_text)
    completion = commands.add_parser("completion", help="a script that completes this command in a shell")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    completion.set_defaults(text=completion_text)
    return parser


def report_text(args: argparse.Namespace) -> str:
    """The report of `args.report` as a table, or its alphas for another run's config."""
    from mols_ds.report.files import load_report
    from mols_ds.report.table import format_report

    if args.to is not None:
        return export_text(load_report(args.report), args.to, args.model)
    if args.fixed_alphas:
        return fixed_alphas_text(load_report(args.report), args.model)
    if args.model is not None:
        raise MolsConfigError("--model: only with --to or --fixed-alphas")
    return format_report(load_report(args.report))


def export_text(report: Report, framework: str, model: str | None) -> str:
    """The alphas of `report` as configuration of `framework`, by the names of `model` (file or checkpoint folder)."""
    from mols_ds.core.groups import group_table, parameter_kinds
    from mols_ds.report.export import export
    from mols_ds.report.fixed_alphas import fixed_alphas, granularity_of
    from mols_ds.training.models import meta_model

    if model is None:
        return export(report, framework)
    table = group_table(meta_model(model), None, granularity_of(report))
    fixed_alphas(report, list(table.elements))
    return export(report, framework, parameter_kinds(table.layouts))


def fixed_alphas_text(report: Report, model: str | None) -> str:
    """The keys of a "mols" section that give a run the alphas of `report`, as JSON; `model`: file or checkpoint folder
    of the model that will use them, against which they are checked."""
    from mols_ds.report.fixed_alphas import fixed_alphas, granularity_of
    from mols_ds.training.models import groups_of

    groups = None if model is None else groups_of(model, granularity_of(report))
    return json.dumps(fixed_alphas(report, groups), indent=2)


def configs_text(args: argparse.Namespace) -> str:
    """The files that come with the package, or where they were copied to."""
    from mols_ds.training.shipped import copy_shipped, shipped_files

    names = shipped_files(args.patterns)
    return "\n".join(names if args.copy is None else map(str, copy_shipped(names, args.copy)))


def completion_text(args: argparse.Namespace) -> str:
    """Source for a shell, by the package shtab."""
    try:
        import shtab
    except ImportError as error:
        raise MolsConfigError("completion: the package shtab is not installed; pip install shtab") from error
    text: str = shtab.complete(_parser(), args.shell)
    return text


def groups_text(args: argparse.Namespace) -> str:
    """The group table of `args.model`: group, parameters (tensors), elements, share of all trainable elements."""
    from mols_ds.core.config import MolsConfig
    from mols_ds.core.groups import group_table
    from mols_ds.training.ds_config import read_config
    from mols_ds.training.models import meta_model

    section = MolsConfig.parse(read_config(args.config).get("mols", {}) if args.config else {})
    table = group_table(meta_model(args.model), section.rules, section.granularity)
    lines = [f"{'group':<12} {'parameters':>10} {'elements':>16} {'share':>8}"]
    lines += [f"{row.group:<12} {row.parameters:>10,} {row.elements:>16,} {row.share:>8.2%}" for row in table]
    if args.parameters:
        width = max(map(len, table.layouts))
        lines.append("")
        lines += [
            f"{name:<{width}}  {'x'.join(map(str, table.shapes[name]))}  {', '.join(layout.groups)}"
            for name, layout in table.layouts.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
