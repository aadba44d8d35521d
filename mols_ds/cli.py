"""The command `mols-ds`: start jobs, run studies, plan runs, print module groups and reports, copy configs."""

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
from mols_ds.training.cli_utils import Parser, positive, run_program

if TYPE_CHECKING:
    from mols_ds.core.schema import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mols-ds` on `argv` (default: the command line). Return the exit status; 2 after a one-line user error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"mols-ds {__version__}")
        return 0
    if arguments[:1] and arguments[0] in JOBS:
        return run_program(f"mols-ds {arguments[0]}", lambda: start_job(arguments[0], arguments[1:]))
    if arguments[:1] == ["launch"]:
        from mols_ds.apps.launch.deepspeed_cli import main as launch

        return launch(arguments[1:])
    if arguments[:1] == ["doctor"]:  # do not import yet what may be broken
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
    launch = "start a script with DeepSpeed's launcher: mols-ds launch --config FILE train.py ..."
    commands.add_parser("launch", help=launch, add_help=False)
    study = "train all arms of a study with equal tuning and several seeds, and write the report"
    add_arguments(commands.add_parser("compare", help=study))
    planned = "predict a run: memory of each rank, communication, time, and the nearest setting that fits"
    add_plan(commands.add_parser("plan", help=planned))
    doctor = "check the installation and a config: mols-ds doctor --config FILE ..."
    commands.add_parser("doctor", help=doctor, add_help=False)
    groups = commands.add_parser("groups", help="print the module groups of a model, without its weights")
    groups.add_argument("model", help="model file (configs/models/*.json) or transformers checkpoint folder")
    groups.add_argument(
        "--config", metavar="FILE", help='DeepSpeed config: rules and granularity of its "mols" section apply'
    )
    groups.add_argument("--parameters", action="store_true", help="print the groups of each parameter too")
    groups.set_defaults(text=groups_text)
    report = commands.add_parser("report", help="print a mols_report.json")
    report.add_argument("report", help="a run's --out, mols_report.json or its folder")
    either = report.add_mutually_exclusive_group()
    either.add_argument("--fixed-alphas", action="store_true", help='print alphas as keys of a "mols" section, in JSON')
    either.add_argument(
        "--to", metavar="FRAMEWORK", choices=FRAMEWORKS, help=f"print alphas as settings of {', '.join(FRAMEWORKS)}"
    )
    report.add_argument("--model", metavar="FILE", help="model for the alphas: checks its groups, prints its names")
    report.set_defaults(text=report_text)
    export = commands.add_parser("export", help="write a checkpoint of train.py as a transformers folder")
    export.add_argument("out", type=Path, help="the run's --out (of a comparison: OUT/adam or OUT/mols)")
    export.add_argument("folder", type=Path, help="folder to write: config, safetensors, tokenizer")
    export.add_argument("--step", type=positive, help="of the checkpoint (default: the newest)")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: the run's)"
    )
    export.set_defaults(text=export_run_text)
    configs = commands.add_parser("configs", help="list or copy the configs, studies, launch files and examples")
    configs.add_argument("patterns", nargs="*", metavar="PATTERN", help="such as configs/models or 'configs/ds_7b*'")
    configs.add_argument("--copy", type=Path, metavar="FOLDER", help="copy the files to FOLDER")
    configs.set_defaults(text=configs_text)
    completion = commands.add_parser("completion", help="print a script that completes this command in a shell")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    completion.set_defaults(text=completion_text)
    return parser


def report_text(args: argparse.Namespace) -> str:
    """Return the report of `args.report` as a table, or its alphas as configuration of another run."""
    from mols_ds.report.files import load_report, run_places, write_run_plot
    from mols_ds.report.table import format_report

    if args.to is not None:
        return export_text(load_report(args.report), args.to, args.model)
    if args.fixed_alphas:
        return fixed_alphas_text(load_report(args.report), args.model)
    if args.model is not None:
        raise MolsConfigError("--model: only with --to or --fixed-alphas")
    text = format_report(load_report(args.report))
    if not Path(args.report).is_dir():
        return text
    from mols_ds.training.trainer import METRICS, read_lines

    metrics = next((place / METRICS for place in run_places(args.report) if (place / METRICS).is_file()), None)
    if metrics is None:
        return text
    lines = [line for line in read_lines(metrics) if "step" in line]
    picture = metrics.with_name("mols_run.png")
    drawn = write_run_plot(lines, picture)
    return f"{text}\n\nSNR and rates over the run: {picture}" if drawn else text


def export_text(report: Report, framework: str, model: str | None) -> str:
    """Return the alphas of `report` as configuration of `framework`, with the names of `model` (file or checkpoint)."""
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
    """Return the alphas of `report` as JSON keys of a "mols" section. Raises MolsConfigError if `model` differs."""
    from mols_ds.report.fixed_alphas import fixed_alphas, granularity_of
    from mols_ds.training.models import groups_of

    groups = None if model is None else groups_of(model, granularity_of(report))
    return json.dumps(fixed_alphas(report, groups), indent=2)


def export_run_text(args: argparse.Namespace) -> str:
    """Write a checkpoint of the run `args.out` to `args.folder`. Return what was written."""
    from mols_ds.training.export_weights import export_run

    return export_run(args.out, args.folder, step=args.step, dtype=args.dtype)


def configs_text(args: argparse.Namespace) -> str:
    """Return the paths of the shipped files, or of their copies with --copy."""
    from mols_ds.training.shipped import copy_shipped, shipped_files

    names = shipped_files(args.patterns)
    return "\n".join(names if args.copy is None else map(str, copy_shipped(names, args.copy)))


def completion_text(args: argparse.Namespace) -> str:
    """Return the completion script for `args.shell`, from the package shtab."""
    try:
        import shtab
    except ImportError as error:
        raise MolsConfigError("completion: the package shtab is not installed; pip install shtab") from error
    text: str = shtab.complete(_parser(), args.shell)
    return text


def groups_text(args: argparse.Namespace) -> str:
    """Return the group table of `args.model`: group, parameters (tensors), elements, share of trainable elements."""
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
