"""Every file in launch/ by what reads it: bash, sbatch's directives, the two Kubernetes kinds, DeepSpeed's hostfile."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mols_ds.apps.launch.signals import SIGNALS
from tests.apps.command import ROOT
from tests.apps.launch.running import LAUNCH, variables

SCRIPTS = sorted(
    path for path in LAUNCH.rglob("*") if path.suffix in {".sh", ".sbatch", ".env"} and "__pycache__" not in path.parts
)
BATCH = sorted(LAUNCH.glob("slurm/*.sbatch"))
STOPPED = 143


def test_no_file_is_left_out() -> None:
    checked = {*SCRIPTS, LAUNCH / "deepspeed", LAUNCH / "hostfile.example", *LAUNCH.glob("kubernetes/*.yaml")}
    assert checked == {path for path in LAUNCH.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC1090,SC1091,SC2034", script], check=True)


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix != ".env"], ids=lambda path: path.name)
def test_what_is_run_can_be(script: Path) -> None:
    sourced = script.name in {"common.sh", "step.sh"}
    assert bool(script.stat().st_mode & 0o111) is not sourced
    assert script.read_text("utf-8").startswith("#!/usr/bin/env bash\n") is not sourced


def settings(folder: Path, **more: str) -> dict[str, str]:
    """The variables that launch/common.sh exports."""
    script = f"source {shlex.quote(str(LAUNCH / 'common.sh'))} && env -0"
    done = subprocess.run(["bash", "-c", script], env=variables(folder, **more), capture_output=True, check=True)
    return dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if entry)


def test_settings_are_exported_and_give_way(tmp_path: Path) -> None:
    found = settings(tmp_path)
    assert (found["NCCL_DEBUG"], found["TORCH_NCCL_ASYNC_ERROR_HANDLING"]) == ("WARN", "1")
    assert found["HF_HOME"] == f"{tmp_path}/shared/huggingface"
    assert Path(found["TRITON_CACHE_DIR"]).is_dir() and found["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/local")
    assert not {"NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "GLOO_SOCKET_IFNAME"} & found.keys()
    own = settings(tmp_path, NCCL_DEBUG="INFO", HF_HOME="/elsewhere", NCCL_SOCKET_IFNAME="ib0")
    assert (own["NCCL_DEBUG"], own["HF_HOME"], own["NCCL_SOCKET_IFNAME"]) == ("INFO", "/elsewhere", "ib0")


@pytest.mark.parametrize("how", ["open", "link"])
def test_a_cache_that_others_can_write_ends_the_script(tmp_path: Path, how: str) -> None:
    if how == "open":
        (tmp_path / "local").mkdir()
        (tmp_path / "local").chmod(0o777)
    else:
        (tmp_path / "other").mkdir(mode=0o700)
        (tmp_path / "local").symlink_to(tmp_path / "other")
    script = f"source {shlex.quote(str(LAUNCH / 'common.sh'))}; echo started"
    done = subprocess.run(["bash", "-c", script], env=variables(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"CACHE_LOCAL: {tmp_path}/local is not this user's alone" in done.stderr


def test_a_cache_is_made_for_this_user_alone(tmp_path: Path) -> None:
    found = settings(tmp_path)
    for variable in ("CACHE_LOCAL", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        assert Path(found[variable]).stat().st_mode & 0o777 == 0o700


RESUMED = {
    "": False,
    "checkpoints/latest": True,
    "checkpoints/step4/manifest.json": True,
    "adam/checkpoints/latest": True,
    "checkpoints/step4.partial/x": False,
}


@pytest.mark.parametrize(("made", "resumed"), RESUMED.items())
def test_rank_resumes_where_there_is_a_checkpoint(tmp_path: Path, made: str, resumed: bool) -> None:
    out = tmp_path / "a run"
    if made:
        (out / made).parent.mkdir(parents=True)
        (out / made).touch()

    def arguments(**more: str) -> list[str]:
        command = [LAUNCH / "rank.sh", "-c", "import sys; print(*sys.argv[1:], sep='\\n')", "--steps", "3"]
        environment = variables(tmp_path, OUT=out, **more)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    start = ["--steps", "3", "--out", str(out)]
    assert arguments() == [*start, *(["--resume"] if resumed else [])]
    assert arguments(RESUME="never") == start
    assert arguments(RESUME="always") == [*start, "--resume"]
    place = out / "adam" if made.startswith("adam") else out
    place.mkdir(exist_ok=True)
    (place / "metrics.jsonl").write_text("{}", "utf-8")
    assert arguments() == [*start, "--resume" if resumed else "--overwrite"]
    assert arguments(RESUME="never") == [*start, "--overwrite"]


def test_example_hostfile() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(LAUNCH / "hostfile.example"))) == {"node01": 8, "node02": 8}


# -- SLURM


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines, which sbatch reads up to the first command."""
    found = {}
    for line in script.read_text("utf-8").splitlines()[1:]:
        if line and not line.startswith("#"):
            break
        if match := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            found[match[1]] = match[2] or ""
        else:
            assert not line.startswith("#SBATCH"), f"sbatch would read {line!r}"
    return found


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_batch_directives(script: Path) -> None:
    found = directives(script)
    signalled = re.fullmatch(r"B:(\w+)@(\d+)", found["signal"])
    assert signalled is not None and f"SIG{signalled[1]}" in {number.name for number in SIGNALS}
    assert int(signalled[2]) >= 300
    assert {"requeue", "exclusive", "mem"} <= found.keys()
    assert found["open-mode"] == "append"
    assert found["output"].count("%j") == 1
    tasks, gpus = int(found["ntasks-per-node"]), int(found["gpus-per-node"])
    assert tasks == (gpus if script.name == "deepspeed.sbatch" else 1)
    assert int(found["nodes"]) == 1 and int(found["cpus-per-task"]) >= 1
    assert not any("=" not in line and "--time" in line for line in found)


# -- Kubernetes


class Part(BaseModel):
    """Of an object: what is named is checked, other fields may be there."""

    model_config = ConfigDict(extra="allow", strict=True)


class Variable(Part):
    name: str
    value: str  # Kubernetes refuses numbers


class Named(Part):
    name: str


class Mount(Part):
    name: str
    mountPath: str


class Container(Part):
    name: str
    image: str
    command: list[str]
    args: list[str]
    env: list[Variable]
    volumeMounts: list[Mount]
    resources: dict[Literal["limits"], dict[str, int]]
    ports: list[dict[str, Any]] = []

    def variable(self, name: str) -> str:
        (value,) = (variable.value for variable in self.env if variable.name == name)
        return value


class Pod(Part):
    terminationGracePeriodSeconds: int
    containers: Annotated[list[Container], Field(min_length=1, max_length=1)]
    volumes: list[Named]

    @model_validator(mode="after")
    def whole(self) -> Pod:
        """What the project needs of every pod."""
        train = self.containers[0]
        assert {mount.name for mount in train.volumeMounts} == {volume.name for volume in self.volumes}
        assert "/dev/shm" in {mount.mountPath for mount in train.volumeMounts}
        assert train.command == ["/workspace/mols-ds/launch/torchrun.sh"], "process 1, or it gets no signal"
        assert (ROOT / train.args[0]).is_file()
        assert "--out" not in train.args and "--resume" not in train.args
        assert int(train.variable("NPROC")) == train.resources["limits"]["nvidia.com/gpu"]
        assert int(train.variable("GRACE")) < self.terminationGracePeriodSeconds
        assert int(train.variable("UNFINISHED")) == STOPPED
        shared = [mount.mountPath for mount in train.volumeMounts if mount.name == "shared"]
        assert train.variable("OUT").startswith(shared[0]) and train.variable("CACHE_SHARED").startswith(shared[0])
        return self


class IndexedPod(Pod):
    restartPolicy: Literal["Never"]  # podFailurePolicy asks for it
    subdomain: str


class IndexedTemplate(Part):
    spec: IndexedPod


class Rule(Part):
    action: Literal["Ignore", "FailJob", "Count"]
    onExitCodes: dict[str, Any] | None = None
    onPodConditions: list[dict[str, str]] | None = None


class FailurePolicy(Part):
    rules: list[Rule]


class IndexedSpec(Part):
    completionMode: Literal["Indexed"]
    completions: int
    parallelism: int
    backoffLimit: int
    podReplacementPolicy: Literal["Failed"]
    podFailurePolicy: FailurePolicy
    template: IndexedTemplate


class IndexedJob(Part):
    apiVersion: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Named
    spec: IndexedSpec


class ServiceSpec(Part):
    clusterIP: Literal["None"]
    publishNotReadyAddresses: Literal[True]
    selector: dict[str, str]
    ports: list[dict[str, Any]]


class Service(Part):
    apiVersion: Literal["v1"]
    kind: Literal["Service"]
    metadata: Named
    spec: ServiceSpec


class Template(Part):
    spec: Pod


class Replica(Part):
    replicas: int
    restartPolicy: Literal["OnFailure"]
    template: Template


class Replicas(Part):
    Master: Replica
    Worker: Replica


class PyTorchSpec(Part):
    runPolicy: dict[str, Any]
    pytorchReplicaSpecs: Replicas


class PyTorchJob(Part):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Named
    spec: PyTorchSpec


def documents(name: str) -> Iterator[Any]:
    return yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text("utf-8"))


def test_indexed_job() -> None:
    first, second = documents("job.yaml")
    service, job = Service.model_validate(first), IndexedJob.model_validate(second)
    spec, pod = job.spec, job.spec.template.spec
    train = pod.containers[0]
    assert spec.completions == spec.parallelism == int(train.variable("NNODES"))
    assert service.metadata.name == pod.subdomain
    assert service.spec.selector == {"job-name": job.metadata.name}
    port = service.spec.ports[0]["port"]
    assert train.variable("RDZV_ENDPOINT") == f"{job.metadata.name}-0.{pod.subdomain}:{port}"
    by_code = {
        code: rule.action for rule in spec.podFailurePolicy.rules for code in (rule.onExitCodes or {}).get("values", [])
    }
    assert by_code == {STOPPED: "Ignore", 2: "FailJob"}
    assert {
        (rule.onExitCodes or {"containerName": train.name})["containerName"] for rule in spec.podFailurePolicy.rules
    } == {train.name}
    assert [{"type": "DisruptionTarget"}] in [rule.onPodConditions for rule in spec.podFailurePolicy.rules]


def test_pytorch_job() -> None:
    (document,) = documents("pytorchjob.yaml")
    job = PyTorchJob.model_validate(document)
    replicas = job.spec.pytorchReplicaSpecs
    master, worker = replicas.Master.template.spec, replicas.Worker.template.spec
    assert master == worker
    train = master.containers[0]
    assert train.name == "pytorch"
    assert replicas.Master.replicas == 1
    assert replicas.Master.replicas + replicas.Worker.replicas == int(train.variable("NNODES"))
    ports = {port["name"]: port["containerPort"] for port in train.ports}
    assert train.variable("RDZV_ENDPOINT") == f"{job.metadata.name}-master-0:{ports['rendezvous']}"
    assert "elasticPolicy" not in document["spec"]


@pytest.mark.parametrize("change", [{"completionMode": "NonIndexed"}, {"completions": "2"}, {"template": {}}])
def test_the_schema_refuses(change: dict[str, Any]) -> None:
    _, job = documents("job.yaml")
    with pytest.raises(ValueError):
        IndexedSpec.model_validate({**job["spec"], **change})
