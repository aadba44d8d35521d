"""Shared by training programs: join the ranks, check a run, print warnings and errors once."""

import argparse
import atexit
import errno
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TextIO

import torch

from mols_ds.core.json_types import JsonMapping
from mols_ds.core.log import tell
from mols_ds.engines.deepspeed.compat import skip_shm_kernel
from mols_ds.errors import MolsConfigError, MolsError, MolsUnsupportedError, MolsWarning, printable
from mols_ds.training.cli_utils import print_line, shell_status, status_of
from mols_ds.training.kernel_caches import check_kernel_caches
from mols_ds.training.preemption import Preempted
from mols_ds.training.rank_env import adopt_rank_environment, be_single_rank, port_taken
from mols_ds.training.run_folder import MistakeEverywhere, check_out

FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE_SECONDS = 15.0
"""Time for rank 0 to print an error (the launcher then ends the others) before other ranks print it too."""


def check_run(args: argparse.Namespace, config: JsonMapping) -> None:
    """Check --compare, --resume, --overwrite and --out against a config, and create the folder --out.

    Raises:
        MolsConfigError: a comparison without a "mols" section, or see `check_out`.
    """
    section = config.get("mols")
    if args.compare and not (section is not None and section.get("enabled", True)):
        raise MolsConfigError(f'--compare adam: config {args.config} has no enabled "mols" section to compare with')
    check_out(args.out, resume=args.resume, overwrite=args.overwrite, compared=bool(args.compare))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def run_command(program: str, command: Callable[[], None]) -> int:
    """Run a program on one rank; rank 0 prints an error in one line on stderr.

    Returns:
        0, also after a signal; 130 for Ctrl-C before the training; 2 for a user's mistake; 1 for a run that cannot
        continue.
    """
    try:
        adopt_rank_environment()
        command()
    except Preempted as stop:
        if _rank() == 0:
            print_line(program, stop)
    except KeyboardInterrupt:  # before the training listens to it
        if _rank() == 0:
            print_line(program, "stopped by SIGINT before the first step; nothing is saved")
        return shell_status(-signal.SIGINT)
    except (MolsError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, MolsError):
            if error.errno not in FULL:
                raise
            error = MolsConfigError(f"{error.filename or 'a file'}: {error.strerror}; make room and start again")
        if (rank := _rank()) != 0 and isinstance(error, MistakeEverywhere):
            return status_of(error)
        if rank != 0:
            # Rank 0 usually has the same error and prints it; then the launcher ends this process. An error of this
            # rank alone (a file missing on its node) must be printed here.
            time.sleep(PATIENCE_SECONDS)
        print_line(f"{program} (rank {rank})" if rank != 0 else program, error)
        return status_of(error)
    atexit.register(leave_ranks)
    return 0


LAST_TENSORS_SECONDS = 0.1
"""Time for the threads of gloo to drop the tensors of the last collective; they need microseconds."""


def leave_ranks() -> None:
    """Destroy the process group, if there is one.

    A thread of gloo that still drops a tensor when the interpreter ends aborts the process (SIGABRT, "terminate called
    without an active exception": ProcessGroupGloo's runLoop waits for the GIL). So release the GIL for a moment first.
    Not after an error: the threads may be in a collective that another rank never joins.
    """
    if torch.distributed.is_initialized():
        time.sleep(LAST_TENSORS_SECONDS)
        torch.distributed.destroy_process_group()


def silence_output() -> None:
    """Silence other output on the terminal, for the progress bar. DeepSpeed's warnings stay."""
    import logging

    from deepspeed.utils import logger
    from transformers.utils import logging as transformers_logging

    logger.setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\..*")
    stock = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, MolsWarning):
            stock(message, category, filename, lineno, file, line)
        elif _rank() == 0:
            tell(f"warning: {printable(message)}", sys.stderr)

    warnings.showwarning = show


def start_ranks(timeout: float | None = None) -> tuple[int, int]:
    """Join the ranks that the launcher started; a plain `python train.py` is one rank.

    Args:
        timeout: seconds after which a collective fails that a rank does not join; None: DeepSpeed's 30 minutes.

    Returns:
        (rank, world size).
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    be_single_rank()
    if get_accelerator().device_name() == "cpu":
        skip_shm_kernel()
        if "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    patience = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    if timeout is not None:
        _limit_new_groups(timedelta(seconds=timeout))
    check_kernel_caches()
    with port_taken():
        deepspeed.init_distributed(**patience)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _limit_new_groups(patience: timedelta) -> None:
    """Make `patience` torch's default timeout for new groups. DeepSpeed creates its groups without a timeout (0.19:
    TorchBackend.new_group, comm/torch.py) and ignores those of init_distributed and DEEPSPEED_TIMEOUT. Ranks would wait
    torch's 10 (NCCL) or 30 minutes for a rank that stopped."""
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if not hasattr(distributed_c10d, name):
            raise MolsUnsupportedError(f"--timeout: this torch has no {name}; leave --timeout out")
        setattr(distributed_c10d, name, patience)
