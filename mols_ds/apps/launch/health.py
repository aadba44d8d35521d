"""Check a node before a job. Run on every node: python -m mols_ds.health [--gpus 8] [--collective].

Each check prints one line to stdout. The exit status is 1 if a check failed, else 0. A check that this machine does not
allow (no nvidia-smi, kernel log readable by root only) prints a note and does not fail. With --collective the program
runs as a rank of the job, under any of its launchers, and all ranks all-reduce a tensor over the job's network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mols_ds.errors import MolsConfigError, printable
from mols_ds.training.cli_utils import Parser, above_zero, amount, integer, run_program
from mols_ds.training.rank_env import DEFAULT_PORT, adopt_rank_environment, rank_environment

PROGRAM = "mols_ds.apps.launch.health"
GIB = 2**30
SHM_GIB, DISK_GIB, COLLECTIVE_MIB = 1.0, 10.0, 64
FINE, NOTED, FAILED = "ok", "note", "FAILED"
ECC_FIELDS = ("index", "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure")


@dataclass(frozen=True)
class Check:
    """Result of one check: its name; FINE, NOTED or FAILED; the observation."""

    check: str
    state: str
    text: str


def gpus(expected: int | None) -> Check:
    """Check that torch sees `expected` GPUs (None: as many as nvidia-smi lists) and that each one computes."""
    import torch

    listed = _nvidia_smi("index")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = len(listed or ()) if expected is None else expected
    if seen < wanted:
        hint = "look at CUDA_VISIBLE_DEVICES, the driver and the job's --gpus-per-node"
        return Check("gpus", FAILED, f"torch sees {seen} of {wanted}: {hint}")
    for device in range(seen):
        try:
            ones = torch.ones(256, 256, device=f"cuda:{device}")
            right = bool((ones @ ones == 256).all())
        except RuntimeError as error:
            return Check("gpus", FAILED, f"GPU {device}: {next(iter(str(error).splitlines()), error)}")
        if not right:
            return Check("gpus", FAILED, f"GPU {device} computes a wrong product: remove the node")
    return Check("gpus", FINE, f"{seen} seen" + ("" if seen else ": training runs on the CPU"))


def _nvidia_smi(*fields: str) -> list[list[str]] | None:
    """Return a row of `fields` for each GPU of this machine, or None if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.strip()]


def memory_errors() -> Check:
    """Check for uncorrectable ECC errors since the driver was loaded, and for pending or failed row remaps."""
    rows = _nvidia_smi(*ECC_FIELDS)
    if rows is None:
        return Check("ecc", NOTED, "not checked: nvidia-smi is missing or does not answer")
    for index, uncorrected, pending, failed in rows:
        if uncorrected.isdigit() and int(uncorrected):
            return Check("ecc", FAILED, f"GPU {index}: {uncorrected} uncorrectable errors: reset it or leave it out")
        if "yes" in (pending.lower(), failed.lower()) or "1" in (pending, failed):
            return Check("ecc", FAILED, f"GPU {index}: row remap pending ({pending}) or failed ({failed}): reset it")
    return Check("ecc", FINE, f"none on {len(rows)} GPUs")


def driver_errors() -> Check:
    """Count Xid lines in the kernel log: errors that the driver reported since the machine started."""
    try:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Check("xid", NOTED, "not checked: this user cannot read the kernel log")
    lines = [line for line in log.splitlines() if "NVRM: Xid" in line]
    if lines:
        return Check("xid", NOTED, f"{len(lines)} since the machine was started, the last: {lines[-1].strip()[:160]}")
    return Check("xid", FINE, "none since the machine was started")


def space(name: str, place: Path, gib: float) -> Check:
    """Check that the file system of `place`, or of its nearest existing parent, has `gib` GiB free."""
    existing = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    text = f"{free:.1f} GiB free in {place}"
    if free < gib:
        hint = "; give the container more (docker --shm-size, an emptyDir of medium Memory)" if name == "shm" else ""
        return Check(name, FAILED, f"{text}, {gib:g} wanted{hint}")
    if not os.access(existing, os.W_OK):
        return Check(name, FAILED, f"{existing} cannot be written")
    return Check(name, FINE, text)


def master(address: str, port: int, first: bool) -> Check:
    """Check that the master address resolves here and, on the `first` node, that its port is free. Only --collective
    can check that other nodes reach the port: rank 0 must listen."""
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        return Check("master", FAILED, f"{address} is not known here: {error.strerror or error}")
    if first:
        with socket.socket(socket.AF_INET6 if ":" in found[0] else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                return Check("master", FAILED, f"port {port}: {error.strerror}: another job? set another MASTER_PORT")
    return Check("master", FINE, f"{address} is {', '.join(found)}" + (f", port {port} is free" if first else ""))


def collective(mib: int, timeout: float) -> Check:
    """All-reduce a tensor of `mib` MiB over all ranks, twice, with NCCL on GPUs and gloo elsewhere. `timeout`: seconds.

    The sum of rank + 1 over ranks is exact in float32. The rate is the bus bandwidth of nccl-tests: 2 (n - 1) / n times
    bytes per second.
    """
    import torch
    from torch import distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if backend == "nccl" else torch.device("cpu")
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        if backend == "nccl":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        rank, world = dist.get_rank(), dist.get_world_size()
        for _ in range(2):  # the first call connects the ranks
            values = torch.full((mib * 2**18,), rank + 1.0, device=device)
            dist.barrier()
            began = time.monotonic()
            dist.all_reduce(values)
            right = bool((values == world * (world + 1) / 2).all())
            seconds = time.monotonic() - began
        dist.barrier()
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        line = next(iter(str(error).splitlines()), type(error).__name__)
        hint = (
            "look at GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (launch/nccl.env), at firewalls and at the other nodes"
        )
        return Check("collective", FAILED, f"{backend} by {where}: {line}; {hint}")
    if not right:
        return Check("collective", FAILED, f"{backend}: rank {rank} got a wrong sum over {world} ranks")
    rate = mib * 2**20 * 2 * (world - 1) / world / seconds / 1e9
    return Check("collective", FINE, f"{backend}, {world} ranks by {where}, {mib} MiB at {rate:.2f} GB/s")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="Check a node before a job.")
    add = parser.add_argument
    add("--gpus", type=integer(0), metavar="N", help="required GPUs (default: as many as nvidia-smi lists)")
    add("--shm-gib", type=amount, default=SHM_GIB, metavar="GIB", help="free in /dev/shm (default %(default)s)")
    add(
        "--disk", action="append", metavar="PATH=GIB", type=_place,
        help=f"required free space for PATH; repeatable (default: {DISK_GIB:g} for the run's $OUT)",
    )  # fmt: skip
    add("--collective", action="store_true", help="run as a rank of the job and all-reduce a tensor")
    add("--mib", type=integer(1), default=COLLECTIVE_MIB, help="size of that tensor (default %(default)s)")
    add(
        "--timeout",
        type=above_zero,
        default=120.0,
        metavar="SECONDS",
        help="time limit to connect the ranks (default %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.disk is None:
        args.disk = [(Path(os.environ.get("OUT", ".")), DISK_GIB)]
    return args


def _place(text: str) -> tuple[Path, float]:
    path, _, gib = text.rpartition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text} is not PATH=GIB")
    return Path(path), float(gib)


def _first_node() -> tuple[str, int] | None:
    """Return (address, port) of rank 0, or of the rendezvous of launch/torchrun.sh."""
    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT") or DEFAULT_PORT)
    host, _, port = os.environ.get("RDZV_ENDPOINT", "").rpartition(":")
    return (host, int(port)) if host and port.isdigit() else None


def findings(args: argparse.Namespace) -> Iterator[Check]:
    """Run the checks of a node, on one of its ranks, and with --collective the all-reduce on all ranks."""
    several = args.collective and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several or os.environ.get("LOCAL_RANK", "0") == "0":
        yield gpus(args.gpus)
        yield memory_errors()
        yield driver_errors()
        for name, path, gib in (("shm", Path("/dev/shm"), args.shm_gib), *(("disk", *place) for place in args.disk)):
            yield space(name, path, gib)
        where = _first_node()
        if where is not None:
            yield master(*where, first=os.environ.get("RANK") == "0" and not several)
    if args.collective:
        if "RANK" not in os.environ:
            raise MolsConfigError("--collective needs a rank: start it with torchrun, srun or DeepSpeed's launcher")
        yield collective(args.mib, args.timeout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0, 1 if a check failed, 2 after a user error."""
    return run_program(PROGRAM, lambda: _check(_arguments(argv)))


def _check(args: argparse.Namespace) -> int:
    failed = False
    host = socket.gethostname()
    if args.collective:
        adopt_rank_environment()
    else:
        os.environ.update(rank_environment(os.environ))
    for finding in findings(args):
        failed = failed or finding.state == FAILED
        rank = os.environ.get("RANK")
        where = host if rank is None else f"{host} rank {rank}"
        print(f"health: {where}: {finding.state:<6} {finding.check}: {printable(finding.text)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
