"""`mols-ds plan`: parse the arguments, read the files, build and print the plan."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mols_ds.apps.plan.calibration import Device
from mols_ds.apps.plan.cluster import Cluster, gib, read_cluster
from mols_ds.core.config import MolsConfig
from mols_ds.core.json_types import JsonMapping
from mols_ds.errors import MolsConfigError, printable_lines
from mols_ds.training.cli_utils import FAILED

if TYPE_CHECKING:
    from mols_ds.apps.plan.gpt import Local
    from mols_ds.apps.plan.job import MegatronJob, ZeroJob
    from mols_ds.training.megatron_settings import Settings

OVERRIDES: tuple[tuple[str, str, Callable[[str], float], str], ...] = (
    ("nodes", "--nodes", int, "number of nodes"),
    ("accelerators", "--accelerators-per-node", int, "accelerators (= ranks) per node"),
    ("memory_gib", "--memory", gib, "memory of one accelerator, such as 80GiB"),
    ("host_memory_gib", "--host-memory", gib, "host memory of one node, such as 2TiB"),
    ("usable_share", "--usable-share", float, "share of the accelerator's memory that tensors may fill"),
    ("intra_node_gbs", "--intra-node", float, "GB/s between accelerators of a node"),
    ("inter_node_gbs", "--inter-node", float, "GB/s from one accelerator to other nodes"),
    ("mfu", "--mfu", float, "expected share of the peak rate"),
)
SEQUENCE = 2048
YAML = (".yaml", ".yml")
"""Suffixes of Megatron configs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mols-ds plan`."""
    add = parser.add_argument
    add("model", nargs="?", help="model file or checkpoint folder; leave out with a Megatron config, which contains it")
    add("--config", required=True, metavar="FILE", help="DeepSpeed config (JSON), or Megatron config (YAML)")
    add("--cluster", metavar="FILE", help="the machines (configs/clusters/*.yaml)")
    for key, flag, kind, text in OVERRIDES:
        add(flag, dest=key, type=kind, metavar="N", help=f"{text}; replaces the file's")
    add("--sequence", type=int, metavar="N", help=f"tokens per sequence (default {SEQUENCE}, or the Megatron config's)")
    add("--micro-batch", type=int, metavar="N", help="sequences per forward pass; replaces the config's")
    add("--steps", type=int, metavar="N", help="optimizer steps of the run (default: the config's)")
    add("--activation-checkpointing", action="store_true", help="as in train.py (DeepSpeed configs)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a key of a Megatron config")
    add("--json", action="store_true", help="print the plan as JSON")
    add("--plot", metavar="FILE", help="plot the memory of each phase")
    add(
        "--simulate",
        action="store_true",
        help="also check that the shards of all ranks count each element once (only in a checkout of mols-ds)",
    )
    parser.set_defaults(text=None)


def plan(args: argparse.Namespace) -> int:
    """Print the plan. Return 0 if the run fits, else 1. Raises MolsConfigError for a user error."""
    from mols_ds.apps.plan.document import document
    from mols_ds.apps.plan.plot import save
    from mols_ds.apps.plan.text import render

    _check(args)
    if args.simulate:
        print(printable_lines(_simulation(args)), file=sys.stderr if args.json else sys.stdout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job = build(args)
        made = document(job)
    if args.plot:
        save(made, args.plot)
    print(json.dumps(made, indent=2) if args.json else printable_lines(render(made)))
    return 0 if made["fits"] else FAILED


def _check(args: argparse.Namespace) -> None:
    for name in ("sequence", "micro_batch", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MolsConfigError(f"--{name.replace('_', '-')} {value}: give a whole number of at least 1")
    if Path(args.config).suffix.lower() in YAML and not Path(args.config).is_file():
        raise MolsConfigError(f"config {args.config}: no such file")


def _simulation(args: argparse.Namespace) -> str:
    """Return the table of --simulate: the plan's model and config on the ranks of its cluster."""
    ranks, tool = cluster_of(args).ranks, simulator()
    if Path(args.config).suffix.lower() in YAML:
        job = tool.SimulatedJob(source=args.config, ranks=ranks, changes=tuple(args.set))
    else:
        job = tool.zero_job(args.model, args.config, ranks)
    return str(tool.checked_table(job))


def simulator() -> ModuleType:
    """Import tests.tools.simulate.command from this checkout. Raises MolsConfigError in an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "tests/tools/simulate/command.py").is_file():
        raise MolsConfigError(
            "--simulate needs the tests, which an installed package does not have: run it in a checkout of mols-ds "
            "(pip install -e .), or leave out --simulate"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("tests.tools.simulate.command")


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Combine the cluster file with the numbers on the command line. Raises MolsConfigError."""
    values = read_cluster(args.cluster) if args.cluster else {}
    given = {key: getattr(args, key) for key, *_ in OVERRIDES if getattr(args, key) is not None}
    if "memory_gib" not in values | given:
        raise MolsConfigError("the memory of an accelerator is missing: give --memory 80GiB or --cluster FILE")
    return Cluster.parse(values | given, f"cluster {args.cluster}" if args.cluster else "cluster")


def build(args: argparse.Namespace) -> ZeroJob | MegatronJob:
    """Build the job of the arguments: a MegatronJob for a YAML config, else a ZeroJob. Raises MolsConfigError."""
    cluster = cluster_of(args)
    if Path(args.config).suffix.lower() in YAML:
        return _grid(args, cluster)
    if args.model is None:
        raise MolsConfigError("a DeepSpeed config does not contain the model: mols-ds plan MODEL --config FILE")
    return _zero(args, cluster)


def _device(mols: MolsConfig | None) -> Device:
    return "accelerator" if mols is not None and mols.accumulators.device == "accelerator" else "cpu"


def _section(content: JsonMapping | None) -> MolsConfig | None:
    mols = None if content is None else MolsConfig.parse(content)
    return mols if mols is not None and mols.enabled else None


def _zero(args: argparse.Namespace, cluster: Cluster) -> ZeroJob:
    from mols_ds.apps.plan.job import ZeroJob
    from mols_ds.apps.plan.model import load
    from mols_ds.apps.plan.zero import ZeroPlan
    from mols_ds.training.ds_config import AUTO, read_config, resolve

    raw = read_config(args.config)
    if args.micro_batch is not None:
        raw |= {"train_micro_batch_size_per_gpu": args.micro_batch, "gradient_accumulation_steps": AUTO}
    brain = raw.setdefault("bf16", {"enabled": AUTO})
    if brain.get("enabled") == AUTO:  # depends on the cluster's accelerators, not on this machine's
        brain["enabled"] = (raw.get("fp16") or {}).get("enabled") is not True
    mols = _section(raw.get("mols"))
    steps = args.steps or (mols.total_steps if mols else None) or _scheduled(raw)
    if steps is None:
        raise MolsConfigError('the length of the run is unknown: give --steps N or "mols.total_steps"')
    config = resolve(raw, world=cluster.ranks, steps=steps, out=Path("runs"))
    decoder = load(args.model, mols.rules if mols else (), mols.granularity if mols else "type")
    return ZeroJob(
        cluster, mols, tuple(row.group for row in decoder.table), steps, int(config["train_batch_size"]),
        args.sequence or min(SEQUENCE, getattr(decoder.config, "max_position_embeddings", SEQUENCE)), _device(mols),
        decoder,
        ZeroPlan.of(config, checkpointing=args.activation_checkpointing, hidden=decoder.config.hidden_size),
    )  # fmt: skip


def _scheduled(config: JsonMapping) -> int | None:
    params = (config.get("scheduler") or {}).get("params") or {}
    total = params.get("total_num_steps")
    return int(total) if isinstance(total, int) else None


def _grid(args: argparse.Namespace, cluster: Cluster) -> MegatronJob:
    from mols_ds.apps.plan.gpt import Gpt
    from mols_ds.apps.plan.grid import MegatronPlan
    from mols_ds.apps.plan.job import MegatronJob
    from mols_ds.training.megatron_config import GridSizes, micro_batches
    from mols_ds.training.megatron_settings import read

    changes = [*args.set, *([f"batch.micro={args.micro_batch}"] if args.micro_batch else [])]
    changes += [f"run.seq_len={args.sequence}"] if args.sequence else []
    settings = read(args.config, changes)
    laid = GridSizes.of(settings, cluster.ranks)
    passes = micro_batches(settings, laid)
    settings = _as_on(settings, cluster)
    precision = settings.precision
    half = precision.dtype != "fp32"
    local = _local(settings, cluster)
    plan = MegatronPlan(
        gpt=Gpt.of(settings, flash=half and local is None, local=local),
        ranks=cluster.ranks,
        weight_bytes=2 if half else 4,
        gradient_bytes=4 if precision.grad_reduce_in_fp32 or not half else 2,
        distributed=settings.parallel.distributed_optimizer,
        overlap=settings.parallel.overlap_grad_reduce,
        optimizer=settings.optimizer.name,
        settings={"momentum": settings.optimizer.momentum},
        micro_batch=settings.batch.micro,
        micro_batches=passes,
        length=settings.run.seq_len,
        gathers=2
        if settings.model.further.get("num_moe_experts") and not settings.parallel.overlap_param_gather
        else 1,
    )
    mols = _section(settings.mols)
    groups = ("embedding", *(() if settings.model.tied_embeddings else ("head",)), "qk", "vo", "mlp", "other")
    return MegatronJob(
        cluster, mols, groups, args.steps or settings.run.steps, settings.batch.total, settings.run.seq_len,
        _device(mols), plan, precision.fp8 is not None,
    )  # fmt: skip


def _as_on(settings: Settings, cluster: Cluster) -> Settings:
    """Replace dtype "auto" by the dtype that the cluster's ranks choose."""
    precision = settings.precision
    if precision.dtype != "auto":
        return settings
    low = precision.fp8 or precision.fp4
    dtype = "fp32" if cluster.device == "cpu" and not low else "bf16"
    return settings.model_copy(update={"precision": precision.model_copy(update={"dtype": dtype})})


def _local(settings: Settings, cluster: Cluster) -> Local | None:
    """Return Megatron's own layers if the job uses them: on CPUs, or if the config asks for them. The plan assumes that
    a cluster's GPUs have Transformer Engine, even if this machine has not."""
    from megatron_patches.machine import Machine
    from mols_ds.apps.plan.gpt import Local
    from mols_ds.training.megatron_config import transformer_config, uses_engine

    engine = "2.8.0"  # newer than any recipe needs
    gpu = Machine(engine, "", (10, 0))
    machine = Machine(None, "the cluster's ranks are processors", None) if cluster.device == "cpu" else gpu
    low = settings.precision.fp8 or settings.precision.fp4
    if (low and cluster.device == "cuda") or uses_engine(settings, machine):
        return None
    model = settings.model
    return Local(transformer_config(settings, machine), model.position_embedding, model.tied_embeddings)
