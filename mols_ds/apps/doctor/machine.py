"""Checks of the machine and of torch: Python, compilers, devices, process groups, limits, disk."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from mols_ds.apps.doctor.findings import Findings
from mols_ds.apps.doctor.imports import Tried
from mols_ds.core.cache_folders import BY_GROUP, cache_problems
from mols_ds.core.compile_locks import lock_problem, stale_locks

LEAST_PYTHON = (3, 11)
GLOO, NCCL = "mols_ds.apps.doctor.backends:gloo", "mols_ds.apps.doctor.backends:nccl"
MIB, GIB = 2**20, 2**30
LEAST_SHARED = 512 * MIB
"""Least size of /dev/shm, as in `deepspeed.env_report`: NCCL and data loaders pass buffers through it."""
LEAST_FILES = 4096
"""Open files: a rank opens sockets to all others, data files and checkpoint shards. Many systems allow 1,024."""
CHECKPOINT_BYTES = 14
"""Bytes per element of a checkpoint: bf16 weight, fp32 weight, two fp32 moments of Adam."""


def check_machine(findings: Findings, out: Path, elements: int | None) -> None:
    """Check Python, compilers, limits and disk. `out`: output folder of a run; `elements`: of the model, if known."""
    for name, check in (
        ("python", _python),
        ("compiler", _compiler),
        ("omp_num_threads", _threads),
        ("shared_memory", _shared_memory),
        ("open_files", _open_files),
        ("compile_locks", _compile_locks),
        ("kernel_caches", _kernel_caches),
    ):
        with findings.guard(name, level="warning"):
            check(findings)
    with findings.guard("disk", level="warning"):
        _disk(findings, out, elements)


def _python(findings: Findings) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        findings.add("problem", "python", f"Python {version}", f"install Python {least} or newer")
    else:
        findings.add("ok", "python", f"Python {version}")


def _compiler(findings: Findings) -> None:
    """Check what DeepSpeed needs to compile its kernels."""
    command = os.environ.get("CXX", "c++")
    missing = []
    if shutil.which(command) is None and shutil.which("g++") is None:
        missing.append(f"no C++ compiler ({command}): install g++")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        missing.append("no Python headers (Python.h): install python3-dev or python3-devel of this Python")
    if shutil.which("ninja") is None:
        missing.append("no ninja: pip install ninja")
    if not missing:
        findings.add("ok", "compiler", "C++ compiler, Python headers and ninja found")
        return
    found = "; ".join(entry.split(": ")[0] for entry in missing)
    fix = "; ".join(entry.split(": ", 1)[1] for entry in missing)
    findings.add(
        "warning",
        "compiler",
        f"{found}: DeepSpeed cannot compile a kernel here (FusedAdam, CPU Adam, NVMe)",
        f'{fix}; or use what needs no kernel, such as AdamW with "torch_adam": true',
    )


def _threads(findings: Findings) -> None:
    given, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if given is None:
        findings.add(
            "note",
            "omp_num_threads",
            f"OMP_NUM_THREADS is not set: each process on a CPU takes all {cores} cores",
            "with several CPU ranks on a machine, set it to cores / ranks (torchrun sets 1, `make train` too)",
        )
    elif not given.isdigit() or not 1 <= int(given) <= cores:
        findings.add(
            "warning",
            "omp_num_threads",
            f"OMP_NUM_THREADS={given}, but this machine has {cores} cores",
            "set it to cores / ranks",
        )
    else:
        findings.add("ok", "omp_num_threads", f"OMP_NUM_THREADS={given} of {cores} cores")


def _shared_memory(findings: Findings) -> None:
    if not Path("/dev/shm").is_dir():
        findings.add("note", "shared_memory", "no /dev/shm on this system")
        return
    size = shutil.disk_usage("/dev/shm").total
    found = f"/dev/shm has {size / MIB:,.0f} MiB"
    if size < LEAST_SHARED:
        fix = "give it 1 GiB or more: docker run --shm-size=8g (Kubernetes: an emptyDir of medium Memory)"
        findings.add("warning", "shared_memory", f"{found}: too little for NCCL and data loaders", fix)
    else:
        findings.add("ok", "shared_memory", found)


def _open_files(findings: Findings) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"limit of {soft} open files"
    if soft == resource.RLIM_INFINITY or soft >= LEAST_FILES:
        findings.add("ok", "open_files", found if soft != resource.RLIM_INFINITY else "no limit of open files")
        return
    most = "unlimited" if hard == resource.RLIM_INFINITY else hard
    fix = f"ulimit -n {min(65536, hard) if hard > 0 else 65536} before the launch (this user may go to {most})"
    findings.add("note", "open_files", f"{found}: low for many ranks on a machine", fix)


def _compile_locks(findings: Findings) -> None:
    problem = lock_problem(stale_locks())
    if problem is None:
        findings.add("ok", "compile_locks", "no stale lock in torch's cache of extensions")
    else:
        findings.add("warning", "compile_locks", *problem)


def _kernel_caches(findings: Findings) -> None:
    problems = cache_problems()
    if not problems:
        findings.add("ok", "kernel_caches", "only this user can write to the caches of compiled kernels")
    for problem in problems:
        refused = os.getuid() != 0 and BY_GROUP not in problem[0]
        findings.add("problem" if refused else "warning", "kernel_caches", *problem)


def _disk(findings: Findings, out: Path, elements: int | None) -> None:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        findings.add("problem", "disk", f"{place} cannot be written", "name a folder that this user may write: --out")
        return
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:,.1f} GiB are free for {out}"
    if elements is None:
        findings.add("ok", "disk", found)
        return
    need = elements * CHECKPOINT_BYTES
    found += f", and a checkpoint with Adam's state takes {need / GIB:,.1f} GiB"
    if free < 2 * need:
        fix = "free space, or write elsewhere; the old checkpoint is removed only after the new one is complete"
        findings.add("problem" if free < need else "warning", "disk", found, fix)
    else:
        findings.add("ok", "disk", found)


# ------------------------------------------------------------------ torch


def check_torch(findings: Findings, tried: Mapping[str, Tried]) -> None:
    """Check torch, its devices and the backends of its process groups."""
    torch_tried = tried["torch"]
    if not torch_tried.works:
        findings.add(
            "problem",
            "torch",
            f"torch cannot be imported: {torch_tried.error}",
            "install a torch that fits this machine (pytorch.org/get-started/locally); nothing else can be checked",
        )
        return
    with findings.guard("torch"):
        _devices(findings)
    gloo = tried[GLOO]
    if gloo.works:
        findings.add("ok", "gloo", f"a gloo group works ({gloo.version})")
    else:
        fix = "the host's own name must resolve: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to a working interface"
        findings.add("problem", "gloo", f"a gloo group of one rank fails: {gloo.error}", fix)
    with findings.guard("nccl"):
        _nccl(findings, tried.get(NCCL))


def _devices(findings: Findings) -> None:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    build = f"ROCm {torch.version.hip}" if getattr(torch.version, "hip", None) else build
    findings.add("ok", "torch", f"torch {torch.__version__}, built for {build}")
    if not torch.cuda.is_available():
        missing = shutil.which("nvidia-smi") is not None
        fix = "install a CUDA build of torch that fits the driver (see nvidia-smi)" if missing else ""
        found = "no CUDA device can be used" + (", though nvidia-smi is here" if missing else ": runs go on the CPU")
        findings.add("warning" if missing else "note", "devices", found, fix)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, capability {device.major}.{device.minor}, {device.total_memory / GIB:,.0f} GiB"
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        fix = "" if bf16 else 'no bf16: use "fp16" or fp32'
        findings.add("ok" if bf16 else "note", f"devices.{index}", found, fix)


def _nccl(findings: Findings, tried: Tried | None) -> None:
    import torch
    from torch import distributed

    if not torch.cuda.is_available():
        findings.add("note", "nccl", "not tried: no CUDA device (gloo serves CPU runs)")
    elif not distributed.is_nccl_available():
        fix = "install a CUDA build of torch for Linux; without NCCL, ranks on GPUs have no backend"
        findings.add("problem", "nccl", "this torch was built without NCCL", fix)
    elif tried is not None and tried.works:
        findings.add("ok", "nccl", f"an NCCL {tried.version} group works")
    else:
        error = tried.error if tried is not None else "it was not tried"
        fix = "NCCL_DEBUG=INFO shows more; check the driver, and that /dev/shm is large enough"
        findings.add("problem", "nccl", f"an NCCL group of one rank fails: {error}", fix)
