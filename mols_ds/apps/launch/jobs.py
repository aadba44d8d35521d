"""`mols-ds train`, `finetune` and `train-megatron`: start a job on this machine, or be a rank of one.

A process that a launcher started (torchrun, DeepSpeed's, srun, mpirun) is a rank. Otherwise torchrun starts `--nproc N`
ranks; the default is one per GPU. SIGTERM and SIGUSR1 go to the ranks (`mols_ds.signals run`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from mols_ds.training.cli_utils import Parser, positive
from mols_ds.training.rank_env import rank_environment

JOBS = {
    "train": ("mols_ds.apps.train", "pre-train a decoder with DeepSpeed: train.py"),
    "finetune": ("mols_ds.apps.finetune.main", "fine-tune on instructions with DeepSpeed: finetune.py"),
    "train-megatron": ("mols_ds.apps.train_megatron.main", "pre-train with Megatron-core: train_megatron.py"),
}
"""Command -> (module whose `main` runs one rank, description)."""


def split_nproc(job: str, argv: Sequence[str]) -> tuple[int | None, list[str]]:
    """Split `argv` into the number of `--nproc` (None if missing) and the arguments of the job's script."""
    parser = Parser(prog=f"mols-ds {job}", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=positive)
    args, rest = parser.parse_known_args(argv)
    return args.nproc, rest


def start_job(job: str, argv: Sequence[str]) -> int:
    """Run a job with `--nproc` and the arguments of its script. Return the exit status."""
    nproc, rest = split_nproc(job, argv)
    count = 1
    if not ("RANK" in os.environ or rank_environment(os.environ) or {"-h", "--help"} & set(rest)):
        import torch

        count = nproc or max(1, torch.cuda.device_count())
    if count == 1:
        status: int = importlib.import_module(JOBS[job][0]).main(rest)
        return status
    from mols_ds.apps.launch.signals import main
    from mols_ds.training.preflight import check_job

    if job != "train-megatron":
        check_job(rest)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return main(["run", "--", *launch, "-m", "mols_ds", job, *rest])
