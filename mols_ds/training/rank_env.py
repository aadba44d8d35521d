"""Set RANK and the other variables of torch.distributed from those of srun and mpirun.

DeepSpeed's launchers for Open MPI, MVAPICH and SLURM (launcher/multinode_runner.py) start the script directly, as an
sbatch file may do with srun. Without this, each of N processes would train alone as rank 0 of 1.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mols_ds.errors import MolsConfigError

DEFAULT_PORT = "29500"


@dataclass(frozen=True)
class _LauncherVariables:
    """Variables of one launcher: rank, world size, local rank, local world size."""

    rank: str
    world: str
    local_rank: str
    local_world: str


# STEP_NUM_TASKS, not SLURM_NTASKS: an sbatch script has the latter and SLURM_PROCID without being a task
SOURCES = (
    _LauncherVariables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    _LauncherVariables(*(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _LauncherVariables(*(f"MV2_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _LauncherVariables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the missing variables of torch.distributed for a process in `environment`. Empty if RANK is set, or if no
    launcher started several processes."""
    if "RANK" in environment:
        return {}
    for source in SOURCES:
        if source.rank in environment and source.world in environment:
            return _translated(source, environment)
    return {}


def _translated(source: _LauncherVariables, environment: Mapping[str, str]) -> dict[str, str]:
    result = {
        "RANK": environment[source.rank],
        "WORLD_SIZE": environment[source.world],
        "LOCAL_RANK": environment.get(source.local_rank, "0"),
        "MASTER_PORT": environment.get("MASTER_PORT") or DEFAULT_PORT,
    }
    local_world = tasks_on_node(environment.get(source.local_world, ""), int(environment.get("SLURM_NODEID", "0")))
    if local_world is not None:
        result["LOCAL_WORLD_SIZE"] = str(local_world)
    if environment[source.world] == "1" and not environment.get("MASTER_ADDR"):
        result["MASTER_ADDR"] = "127.0.0.1"
    return result


def tasks_on_node(counts: str, node: int) -> int | None:
    """Tasks on node number `node` of SLURM's list: "4", "4(x2)" (two nodes of 4) or "4(x2),3"."""
    nodes: list[int] = []
    for part in filter(None, counts.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return None
        nodes += [int(found[1])] * int(found[2] or 1)
    return nodes[node] if node < len(nodes) else None


def adopt_rank_environment() -> None:
    """Add `rank_environment` of this process to os.environ.

    Raises:
        MolsConfigError: several ranks, and no variable names the host of rank 0.
    """
    adopted = rank_environment(os.environ)
    os.environ.update(adopted)
    if adopted and not os.environ.get("MASTER_ADDR"):
        raise MolsConfigError(
            f"this process was started as rank {adopted['RANK']} of {adopted['WORLD_SIZE']}, but MASTER_ADDR is not "
            "set: export the name or address of the first node to all ranks (docs/launching.md)"
        )


def be_single_rank() -> None:
    """Make a process that no launcher started rank 0 of 1, on a free port unless MASTER_PORT is set."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: os.environ.get(key, value) for key, value in defaults.items()})


@contextlib.contextmanager
def port_taken() -> Iterator[None]:
    """Raise MolsConfigError if joining the ranks in this `with` block fails because their port is taken."""
    try:
        yield
    except Exception as error:  # torch.distributed.DistNetworkError; this module imports no torch
        if "EADDRINUSE" not in str(error):
            raise
        raise MolsConfigError(
            f"port {os.environ.get('MASTER_PORT')} of this machine is taken, perhaps by another run: give another one "
            "(deepspeed --master_port N, torchrun --master-port N or --standalone, MASTER_PORT elsewhere)"
        ) from error
