"""The same job on one host with four ranks and on two hosts with two each, by every way in launch/, for real.

All runs must end with the same alphas and weights, bit for bit: what differs is which ranks share a host, and gloo's
all-reduce adds in the same order wherever its ranks are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mols_ds.training.trainer import TIMED
from tests.apps.command import ROOT, job_arguments, read_metrics, write_job
from tests.apps.launch.network import NAMES, Hosts, two_hosts
from tests.apps.launch.running import LAUNCH, TIME_LIMIT, finish
from tests.helpers.harness import run_ranks

pytestmark = [pytest.mark.jobs, pytest.mark.distributed, pytest.mark.tier("all")]

STEPS = 3
PORT = 29640  # of the two hosts' own network


@dataclass(frozen=True)
class Bench:
    """The job's files, and the two hosts."""

    hosts: Hosts
    paths: dict[str, Path]

    def arguments(self, *more: str) -> tuple[str, ...]:
        """train.py's arguments but for --out, which launch/rank.sh adds."""
        args = job_arguments(self.paths, Path("unused"), "--steps", str(STEPS), "--eval-every", "0", *more)
        where = args.index("--out")
        cache = ["--cache-dir", str(self.hosts.folder / "cache"), "--deepspeed_config", str(self.paths["config"])]
        return (*args[:where], *args[where + 2 :], *cache)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder) as hosts:
        yield Bench(hosts, write_job(folder))


def train(*arguments: str) -> int:
    """train.py on a rank of the harness."""
    from mols_ds.apps.train import main

    return main(list(arguments))


@pytest.fixture(scope="module")
def one_host(bench: Bench) -> Path:
    """Four ranks on this host, without a launcher."""
    out = bench.hosts.folder / "one_host"
    assert run_ranks(train, 4, *bench.arguments("--out", str(out)), timeout=TIME_LIMIT) == [0] * 4
    return out


def result(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The lines of the metrics but for times (the last has the alphas), and the weights after the last step."""
    lines = [{key: line[key] for key in line if key not in TIMED} for line in read_metrics(out)]
    states = torch.load(out / "checkpoints" / f"step{STEPS}" / "mp_rank_00_model_states.pt", weights_only=False)
    return lines, states["module"]


def assert_same(out: Path, other: Path) -> None:
    lines, weights = result(out)
    expected_lines, expected = result(other)
    assert len(set(expected_lines[-1]["alphas"].values())) > 1
    assert lines == expected_lines
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.tier("full")
def test_hostfile(bench: Bench, one_host: Path) -> None:
    out = bench.hosts.folder / "hostfile"
    hostfile = bench.hosts.folder / "hostfile.txt"
    hostfile.write_text("".join(f"{name} slots=2\n" for name in NAMES), "utf-8")
    launcher = ["deepspeed", "--hostfile", str(hostfile), "--master_port", str(PORT)]
    finish(bench.hosts.command(0, *launcher, "train.py", *bench.arguments("--out", str(out))), bench.hosts.folder)
    assert_same(out, one_host)


@pytest.mark.tier("full")
def test_torchrun(bench: Bench, one_host: Path) -> None:
    out = bench.hosts.folder / "torchrun"
    script = str(LAUNCH / "torchrun.sh")
    both = ["srun", "--ntasks-per-node=1", script, "train.py", *bench.arguments()]
    variables = {"NNODES": "2", "NPROC": "2", "RDZV_ENDPOINT": f"node01:{PORT}", "HEALTH": "off"}
    finish(both, bench.hosts.folder, OUT=out, SLURM_JOB_NODELIST=",".join(NAMES), **variables)
    assert_same(out, one_host)


def test_slurm_environment(bench: Bench, one_host: Path) -> None:
    out = bench.hosts.folder / "slurm"
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    script = str(LAUNCH / "slurm" / "deepspeed.sbatch")
    command = bench.hosts.command(0, "bash", script, *bench.arguments())
    text = finish(command, bench.hosts.folder, OUT=out, SLURM_JOB_NODELIST=",".join(NAMES), **job)
    assert_same(out, one_host)
    assert text.count("ok     master: node01 is 10.77.0.1") == 2
    assert not (bench.hosts.folder / "bin" / "requeued").exists()
