"""`deepspeed --config FILE script.py`: DeepSpeed's launcher with one more option.

The launcher's parser gets `--config`: all other options keep their meaning, and a `--config` after the script belongs
to the script. The script gets the file as the arguments `--deepspeed --deepspeed_config FILE`, because environment
variables do not reach other nodes. Every rank runs the script through run_script.py (beside this file), which calls
`mols_ds.patch()`.

SIGTERM, SIGUSR1 and Ctrl-C go to the ranks on all nodes: they save a checkpoint and exit with 0, then the launcher
exits. A second Ctrl-C kills the ranks of this machine.
mols_ds/apps/launch/signals.py describes what DeepSpeed's launcher does without it.
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
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

from mols_ds.apps.launch.signals import IDLE_SECONDS, SENT, ranks_below, send
from mols_ds.core.log import tell
from mols_ds.engines.deepspeed import compat
from mols_ds.engines.deepspeed.config_reader import read_config
from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.training.cli_utils import USER_MISTAKE, Parser, print_line, shell_status
from mols_ds.training.preemption import LISTENED
from mols_ds.training.preflight import check_job, is_job

if TYPE_CHECKING:
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

Hosts = dict[str, list[int]]
"""Host -> its slots that the job uses."""
Process = subprocess.Popen[bytes]
Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
PROGRAM = "deepspeed"
CONFIG_OPTIONS = ("--deepspeed_config", "--config")
ROOT = str(Path(__file__).resolve().parents[3])
RUNNER = "deepspeed.launcher.runner"
NODE_LAUNCHER = "deepspeed.launcher.launch"
LAUNCH_NODE = str(Path(__file__).with_name("launch_node.py").resolve())
RUN_SCRIPT = str(Path(__file__).with_name("run_script.py").resolve())
UNMAPPED = ("OpenMPIRunner", "MVAPICHRunner", "SlurmRunner")
"""Runners of DeepSpeed (launcher/multinode_runner.py) that start the script directly, without a master address."""


class RunnerParser(Parser):
    """Parser of DeepSpeed's runner, with `--config`."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description=description, **options)
        self.add_argument("--config", dest="ds_config", metavar="FILE", help="DeepSpeed config, passed to the script")


def _copy_with(module: object, **changes: object) -> ModuleType:
    """Return a copy of `module` with changed attributes, to replace it in the runner."""
    copy = ModuleType("copy")
    copy.__dict__.update(vars(module))
    copy.__dict__.update(changes)
    return copy


def script_arguments(user_args: Sequence[str], config: str | None) -> list[str]:
    """Append the config to the script's arguments, unless they already name one. Return the arguments."""
    named = any(arg.split("=", 1)[0] in CONFIG_OPTIONS for arg in user_args)
    if config is None or named:
        return list(user_args)
    extra = ["--deepspeed_config", os.path.abspath(config) if os.path.exists(config) else config]
    return [*user_args, *([] if "--deepspeed" in user_args else ["--deepspeed"]), *extra]


class _Job:
    """One call of DeepSpeed's runner: its arguments and the process that it started."""

    def __init__(self) -> None:
        self.args = argparse.Namespace()
        self.active: Hosts = {}
        self.process: Any = None
        self.end: Any = None
        """The runner's own SIGTERM handler: with pdsh, it kills the launchers of all nodes."""
        self.interrupted = False

    # -- replacements of the runner's functions

    def parse(self, stock: Callable[..., argparse.Namespace], args: Sequence[str] | None = None) -> argparse.Namespace:
        """Replace the runner's `parse_args`: add `--config`, raise MolsConfigError for a missing file."""
        with mock.patch(f"{RUNNER}.argparse", _copy_with(argparse, ArgumentParser=RunnerParser)):
            parsed = stock(args)
        if parsed.ds_config is not None and not os.path.isfile(parsed.ds_config):
            read_config(parsed.ds_config)  # base64, or raises: no such file
        if not parsed.module and not parsed.no_python and not os.path.isfile(parsed.user_script):
            raise MolsConfigError(f"{parsed.user_script}: no such script")
        parsed.user_args = script_arguments(parsed.user_args, parsed.ds_config)
        if is_job(parsed.user_script):
            check_job(parsed.user_args)
        if parsed.no_python:
            print_line(PROGRAM, "--no_python: MoLS is off for the program; call mols_ds.patch() in its script")
        else:
            parsed.user_args = [*(["-m"] if parsed.module else []), parsed.user_script, *parsed.user_args]
            parsed.user_script, parsed.module = RUN_SCRIPT, False
        self.args = parsed
        return parsed

    def remember(self, stock: Callable[[Hosts], str], world_info: Hosts) -> str:
        """Replace the runner's `encode_world_info`. The runner calls it once, with the hosts and slots of the job."""
        self.active = dict(world_info)
        return stock(world_info)

    def start(self, stock: Callable[..., Process], command: Sequence[str], **options: object) -> Process:
        """Replace the runner's `Popen`. The first process is the job; the runner starts others to end it."""
        process = stock(deaf_launcher(command), **options)
        self.process = self.process or process
        return process

    def listen(self, number: int, handler: Handler) -> Handler:
        """Replace the runner's `signal.signal`, which it calls only with pdsh."""
        if number not in LISTENED:
            return signal.signal(number, handler)
        self.end = handler
        return signal.getsignal(number)

    # -- signals

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal to the ranks, except a first Ctrl-C that they have heard themselves.

        Launchers that forward signals (mpirun, srun) get SIGUSR1, which they pass to all ranks; on SIGTERM, mpirun
        would kill the ranks.
        """
        if self.process is None:
            sys.exit(shell_status(-number))
        if number == signal.SIGINT and self.interrupted:
            send(ranks_below(os.getpid()), signal.SIGKILL)
            return
        self.interrupted |= number == signal.SIGINT
        several = (len(self.active) > 1 or self.args.force_multi) and not self.args.no_ssh
        if several and self.args.launcher.lower() == "pdsh":
            if not self.reached(signal.SIGTERM if number == signal.SIGINT else number):
                self.end(number, frame)
        elif several:
            self.process.send_signal(signal.SIGUSR1)
        elif number == signal.SIGINT and in_foreground():
            return
        elif not send(ranks_below(os.getpid()), number):
            later = threading.Timer(IDLE_SECONDS, self.process.terminate)
            later.daemon = True
            later.start()

    def reached(self, number: int) -> bool:
        """Send a signal to the ranks on all hosts. Return False if no host has a rank yet. One host is enough: all
        ranks end together, so others may find theirs gone."""
        args = self.args
        words = [sys.executable, "-m", "mols_ds.signals", "send", signal.Signals(number).name]
        there = f"cd /; PYTHONPATH={shlex.quote(ROOT)} {shlex.join(words)} --port {args.master_port}"
        command = ["pdsh", "-S", "-w", ",".join(self.active), *shlex.split(args.launcher_args), there]
        environment = {**os.environ, "PDSH_RCMD_TYPE": "ssh"}  # as DeepSpeed's PDSHRunner sets it
        if args.ssh_port is not None:
            environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} -p {args.ssh_port}"
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        tell(done.stdout.rstrip("\n"), sys.stderr)
        return SENT in done.stdout


def _with_master(runner_class: type[MultiNodeRunner]) -> type[MultiNodeRunner]:
    """Return a subclass of a DeepSpeed runner that also exports the address of rank 0. Ranks get their number from the
    launcher's variables (mols_ds/training/rank_env.py)."""

    class Runner(runner_class):  # type: ignore[misc]
        def get_cmd(self, environment: dict[str, str], active_resources: Hosts) -> list[str]:
            self.add_export("MASTER_ADDR", str(self.args.master_addr))
            self.add_export("MASTER_PORT", str(self.args.master_port))
            command: list[str] = super().get_cmd(environment, active_resources)
            return command

    return Runner


def deaf_launcher(command: Sequence[str]) -> list[str]:
    """Return the command of DeepSpeed's launcher on this machine with `LAUNCH_NODE` in its place."""
    words = list(command)
    if NODE_LAUNCHER in words:
        where = words.index(NODE_LAUNCHER)
        if words[where - 1] == "-m":
            words[where - 1 : where + 1] = [LAUNCH_NODE]
    return words


def in_foreground() -> bool:
    """Whether this process is in the foreground of a terminal, whose Ctrl-C goes to its child processes too."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextlib.contextmanager
def _listening(job: _Job) -> Iterator[None]:
    """Forward signals to the job's ranks, unless another handler is set."""
    main_thread = threading.current_thread() is threading.main_thread()
    stock = (signal.SIG_DFL, signal.default_int_handler)
    ours = {number: signal.getsignal(number) for number in LISTENED if main_thread}
    ours = {number: handler for number, handler in ours.items() if handler in stock}
    for number in ours:
        signal.signal(number, job.forward)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run DeepSpeed's launcher on `argv` (default: the command line). Return 2 after a one-line user error, else its
    status: that of the first process that failed, or 128 + the signal that ended it."""
    job = _Job()
    try:
        runner = compat.module(RUNNER)
        changes: dict[str, Any] = {
            "parse_args": partial(job.parse, runner.parse_args),
            "encode_world_info": partial(job.remember, runner.encode_world_info),
            "subprocess": _copy_with(runner.subprocess, Popen=partial(job.start, runner.subprocess.Popen)),
            "signal": _copy_with(signal, signal=job.listen),
            **{name: _with_master(getattr(runner, name)) for name in UNMAPPED},
        }
        with mock.patch.multiple(runner, **changes), _listening(job):
            runner.main(None if argv is None else list(argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except (ValueError, RuntimeError, AssertionError, MolsUnsupportedError) as error:
        # the launcher raises the first three for wrong hosts, slots and counts
        print_line(PROGRAM, error)
        return USER_MISTAKE
    return shell_status(getattr(job.process, "returncode", 0))
