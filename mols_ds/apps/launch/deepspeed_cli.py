"""`deepspeed --config FILE script.py`: DeepSpeed's own launcher with one more option.

The launcher's parser takes `--config`, so that every other option means what it always means and a `--config` behind
the script stays the script's. The file reaches the script as `--deepspeed --deepspeed_config FILE`: as arguments,
because environment variables do not travel to other nodes. Every rank runs the script by run_script.py (beside this
file), which turns `mols_ds.patch()` on.

SIGTERM and SIGUSR1 go to the ranks, wherever they are, so that they save a checkpoint and exit with 0 and the launcher
with them; what DeepSpeed's launcher does by itself is in mols_ds/apps/launch/signals.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from mols_ds.apps.launch.signals import IDLE_SECONDS, SENT, ranks_below, send
from mols_ds.core.log import tell
from mols_ds.engines.deepspeed import compat
from mols_ds.engines.deepspeed.config_reader import read_config
from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.training.cli_utils import USER_MISTAKE, Parser, print_line, shell_status
from mols_ds.training.preemption import SIGNALS

if TYPE_CHECKING:
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

Hosts = dict[str, list[int]]
"""Host -> the slots of it that the job uses."""
Process = subprocess.Popen[bytes]
Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
PROGRAM = "deepspeed"
CONFIG_OPTIONS = ("--deepspeed_config", "--config")
ROOT = str(Path(__file__).resolve().parents[3])
RUNNER = "deepspeed.launcher.runner"
RUN_SCRIPT = str(Path(__file__).with_name("run_script.py").resolve())
UNMAPPED = ("OpenMPIRunner", "MVAPICHRunner", "SlurmRunner")
"""Runners of DeepSpeed (launcher/multinode_runner.py) that start the script itself and tell it no master address."""


class RunnerParser(Parser):
    """The parser of DeepSpeed's runner, with `--config`."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description=description, **options)
        self.add_argument("--config", dest="ds_config", metavar="FILE", help="DeepSpeed config, passed to the script")


def _copy_with(module: object, **changes: object) -> ModuleType:
    """A copy of `module` (or of what stands for one) with other attributes, to be put in its place in the runner."""
    copy = ModuleType("copy")
    copy.__dict__.update(vars(module))
    copy.__dict__.update(changes)
    return copy


def script_arguments(user_args: Sequence[str], config: str | None) -> list[str]:
    """The script's arguments with the config added, unless the user's own name one."""
    named = any(arg.split("=", 1)[0] in CONFIG_OPTIONS for arg in user_args)
    if config is None or named:
        return list(user_args)
    extra = ["--deepspeed_config", os.path.abspath(config) if os.path.exists(config) else config]
    return [*user_args, *([] if "--deepspeed" in user_args else ["--deepspeed"]), *extra]


def _run_patched(parsed: argparse.Namespace) -> None:
    """Have the ranks run the user's script or module by RUN_SCRIPT. What `--no_python` starts cannot be reached."""
    if parsed.no_python:
        print_line(PROGRAM, "--no_python: MoLS is not turned on for the program; a script of it calls mols_ds.patch()")
        return
    parsed.user_args = [*(["-m"] if parsed.module else []), parsed.user_script, *parsed.user_args]
    parsed.user_script, parsed.module = RUN_SCRIPT, False


class _Job:
    """One call of DeepSpeed's runner: what it was asked for, and the process that it started."""

    def __init__(self) -> None:
        self.args = argparse.Namespace()
        self.active: Hosts = {}
        self.process: Any = None
        self.end: Any = None
        """What the runner itself would do on SIGTERM: with pdsh, kill the launchers of all nodes."""

    # -- what takes the place of the runner's own

    def parse(self, stock: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
        """The runner's `parse_args`, taking `--config` and refusing files that are not there."""

        def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
            runner: Any = compat.module(RUNNER)
            stock_argparse = runner.argparse
            runner.argparse = _copy_with(stock_argparse, ArgumentParser=RunnerParser)
            try:
                parsed = stock(args)
            finally:
                runner.argparse = stock_argparse
            if parsed.ds_config is not None and not os.path.isfile(parsed.ds_config):
                read_config(parsed.ds_config)  # a base64 text, or no such file
            if not parsed.module and not parsed.no_python and not os.path.isfile(parsed.user_script):
                raise MolsConfigError(f"{parsed.user_script}: no such script")
            parsed.user_args = script_arguments(parsed.user_args, parsed.ds_config)
            _run_patched(parsed)
            self.args = parsed
            return parsed

        return parse_args

    def remember(self, stock: Callable[[Hosts], str]) -> Callable[[Hosts], str]:
        """The runner's `encode_world_info`, which is called once with the hosts and slots that are used."""

        def encode_world_info(world_info: Hosts) -> str:
            self.active = dict(world_info)
            return stock(world_info)

        return encode_world_info

    def start(self, stock: Callable[..., Process]) -> Callable[..., Process]:
        """The runner's `Popen`; the first process is the job, others are how the runner ends it."""

        def popen(command: Sequence[str], **options: object) -> Process:
            process = stock(command, **options)
            self.process = self.process or process
            return process

        return popen

    def listen(self, number: int, handler: Handler) -> Handler:
        """The runner's `signal.signal`, which it calls with pdsh only."""
        if number not in SIGNALS:
            return signal.signal(number, handler)
        self.end = handler
        return signal.getsignal(number)

    # -- signals

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Hands SIGTERM or SIGUSR1 to the ranks. Processes that hand signals on themselves get SIGUSR1, which mpirun
        and srun pass to all ranks: SIGTERM would make mpirun kill them."""
        if self.process is None:
            sys.exit(shell_status(-number))
        several = (len(self.active) > 1 or self.args.force_multi) and not self.args.no_ssh
        if several and self.args.launcher.lower() == "pdsh":
            if not self.reached(number):
                self.end(number, frame)
        elif several:
            self.process.send_signal(signal.SIGUSR1)
        elif not send(ranks_below(os.getpid()), number):
            later = threading.Timer(IDLE_SECONDS, self.process.terminate)
            later.daemon = True
            later.start()

    def reached(self, number: int) -> bool:
        """Whether any host has got a signal to its ranks: none, as long as none has started any. Where one has, others
        may find theirs gone: all ranks end with the first that is told."""
        done = subprocess.run(
            self.remote(number), env=self.remote_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        tell(done.stdout.rstrip("\n"), sys.stderr)
        return SENT in done.stdout

    def remote(self, number: int) -> list[str]:
        """The pdsh command that sends a signal to the ranks on all hosts of this job."""
        args = self.args
        words = [sys.executable, "-m", "mols_ds.signals", "send", signal.Signals(number).name]
        there = f"cd /; PYTHONPATH={shlex.quote(ROOT)} {shlex.join(words)} --port {args.master_port}"
        return ["pdsh", "-S", "-w", ",".join(self.active), *shlex.split(args.launcher_args), there]

    def remote_environment(self) -> dict[str, str]:
        """What DeepSpeed's PDSHRunner adds to pdsh's environment."""
        port = self.args.ssh_port
        more = (
            {} if port is None else {"PDSH_SSH_ARGS_APPEND": f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} -p {port}"}
        )
        return {**os.environ, "PDSH_RCMD_TYPE": "ssh", **more}


def _with_master(runner_class: type[MultiNodeRunner]) -> type[MultiNodeRunner]:
    """A runner of DeepSpeed that also tells the ranks where rank 0 is; they take their number from the launcher's
    variables, see mols_ds/training/rank_env.py."""

    class Runner(runner_class):  # type: ignore[misc]
        def get_cmd(self, environment: dict[str, str], active_resources: Hosts) -> list[str]:
            self.add_export("MASTER_ADDR", str(self.args.master_addr))
            self.add_export("MASTER_PORT", str(self.args.master_port))
            command: list[str] = super().get_cmd(environment, active_resources)
            return command

    return Runner


@contextlib.contextmanager
def _changed(runner: ModuleType, job: _Job) -> Iterator[None]:
    """DeepSpeed's runner with what `job` and `_with_master` put into it."""
    changes = {
        "parse_args": job.parse(runner.parse_args),
        "encode_world_info": job.remember(runner.encode_world_info),
        "subprocess": _copy_with(runner.subprocess, Popen=job.start(runner.subprocess.Popen)),
        "signal": _copy_with(signal, signal=job.listen),
        **{name: _with_master(getattr(runner, name)) for name in UNMAPPED},
    }
    stock = {name: getattr(runner, name) for name in changes}
    vars(runner).update(changes)
    try:
        yield
    finally:
        vars(runner).update(stock)


@contextlib.contextmanager
def _listening(job: _Job) -> Iterator[None]:
    """SIGTERM and SIGUSR1 go to the job's ranks, where nobody else has asked for them."""
    main_thread = threading.current_thread() is threading.main_thread()
    ours = [number for number in SIGNALS if main_thread and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, job.forward)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs DeepSpeed's launcher on `argv` (default: the command line). Returns its status, or 2 for a user's mistake;
    the launcher itself hands on the status of the first process that failed, but for one that a signal ended (its
    status is negative): 128 + the signal."""
    job = _Job()
    try:
        runner = compat.module(RUNNER)
        with _changed(runner, job), _listening(job):
            runner.main(None if argv is None else list(argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except (ValueError, RuntimeError, AssertionError, MolsUnsupportedError) as error:
        # The first three are how the launcher refuses hosts, slots and counts.
        print_line(PROGRAM, error)
        return USER_MISTAKE
    return shell_status(getattr(job.process, "returncode", 0))
