"""Send signals to the ranks of a job directly, not through their launcher.

On SIGTERM and SIGUSR1, training saves a checkpoint and exits with 0 (mols_ds/training/preemption.py). Launchers do not
forward signals like that. torchrun (torch/distributed/elastic/agent/server/api.py, `run`) forwards SIGTERM, kills the
ranks 30 s later and always fails; SIGUSR1 kills it without a signal to its ranks. DeepSpeed's launcher/launch.py ends
the ranks one by one, with up to 30 s each, and fails. Ranks that get the signal directly end cleanly, and so does the
launcher. The ranks agree on the step among themselves, so a signal to those of one node is enough.

Ctrl-C and a closed terminal do the same here: the launcher runs in a process group of its own, which the terminal does
not signal. A second Ctrl-C ends everything at once.

    python -m mols_ds.signals run torchrun --nnodes 2 ... train.py ...   instead of `torchrun ...`
    python -m mols_ds.signals send SIGUSR1 --port 29500                  to the ranks on this machine, from anywhere
    python -m mols_ds.signals finished runs/7b                           status 0 if the run finished its last step
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

from mols_ds.core.files import read_text
from mols_ds.core.json_text import parse_json
from mols_ds.errors import MolsConfigError, MolsError
from mols_ds.training.cli_utils import (
    COMMAND_NOT_FOUND,
    FAILED,
    Parser,
    above_zero,
    integer,
    print_line,
    run_program,
    shell_status,
)
from mols_ds.training.preemption import SIGNALS

PROGRAM = "mols_ds.apps.launch.signals"
METRICS = ("metrics.jsonl", "mols/metrics.jsonl")
"""Metrics files of a run, and of the second arm of a comparison. Training writes the last line after its last step."""
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)
SENT = "was sent to"
GRACE_SECONDS = 600.0
"""Seconds that ranks get to finish a step and save. The cluster's own limit is usually shorter."""
IDLE_SECONDS = 30.0
"""Seconds that a launcher without ranks gets after a signal. The ranks may just have ended because those of another
node got the signal, and the launcher is about to notice."""
KILL_SECONDS = 40.0
"""Seconds that the launcher then gets to end its ranks: torchrun and DeepSpeed give theirs 30 s."""
_POLL_SECONDS = 0.2


def ranks_among(processes: Iterable[psutil.Process], port: int | None = None) -> list[psutil.Process]:
    """Return the ranks among `processes` (of the job on `port`): those with LOCAL_RANK in their environment whose
    parent has none.

    Child processes of a rank (data workers) inherit its environment and are left to the rank. RANK does not work here:
    Kubeflow sets it in every pod.
    """
    found: dict[int, psutil.Process] = {}
    parents: dict[int, int] = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            environment = process.environ()
            if "LOCAL_RANK" in environment and (port is None or environment.get("MASTER_PORT") == str(port)):
                parents[process.pid] = process.ppid()
                found[process.pid] = process
    return [process for pid, process in found.items() if parents[pid] not in found]


def ranks_below(pid: int) -> list[psutil.Process]:
    """Return the ranks among the descendants of process `pid`."""
    try:
        return ranks_among(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def ranks_here(port: int) -> list[psutil.Process]:
    """Return the ranks on this machine that belong to this user and to the job whose MASTER_PORT is `port`."""
    found = psutil.process_iter(["uids"])
    mine = [process for process in found if (uids := process.info["uids"]) and uids.real == os.getuid()]
    return ranks_among(mine, port)


def send(processes: Iterable[psutil.Process], number: int) -> int:
    """Send signal `number`. Return how many processes got it."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            count += 1
    return count


def finished(out: Path) -> bool:
    """Return True if the run in `out` finished its last step. A run that a signal ended exits with 0 too."""
    for path in (out / name for name in METRICS):
        with contextlib.suppress(MolsError):
            lines = read_text(path, str(path)).splitlines() if path.is_file() else []
            last = parse_json(lines[-1], str(path)) if lines else None
            if isinstance(last, dict) and last.get("final"):
                return True
    return False


class Supervisor:
    """Run a launcher and forward SIGTERM and SIGUSR1 to its ranks. Main thread only."""

    def __init__(self, command: Sequence[str], grace: float = GRACE_SECONDS) -> None:
        self.command, self.grace = list(command), grace
        self._heard = 0
        self._first: int | None = None
        self._told: set[int] = set()
        self._interrupted = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._heard = number
        self._first = self._first or number

    def run(self) -> int:
        """Run the launcher. Return its exit status, or 128 + n if signal n ended it, also before any rank started."""
        # The launcher and new ranks ignore SIGUSR1 until they handle it: it is for ranks that already train.
        former = {number: signal.getsignal(number) for number in (*SIGNALS, *FROM_TERMINAL)}
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        process = subprocess.Popen(self.command, process_group=0)
        try:
            for number, handler in former.items():
                if handler != signal.SIG_IGN or number in SIGNALS:  # nohup
                    signal.signal(number, self._note)
            status = self._wait(process)
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return shell_status(status)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        limit: float | None = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
            if self._heard:
                number, self._heard = self._heard, 0
                if number == signal.SIGINT and self._interrupted:
                    return self._kill(process)
                self._interrupted |= number == signal.SIGINT
                forwarded = self._forward(process.pid, number)
                patience = self.grace if forwarded else min(self.grace, IDLE_SECONDS)
                limit = min(limit or float("inf"), time.monotonic() + patience)
            elif limit is not None:
                # New ranks after the signal: the launcher mistook the exit for a failure.
                again = any(rank.pid not in self._told for rank in ranks_below(process.pid))
                if again or time.monotonic() > limit:
                    print_line(PROGRAM, "ending the launcher")
                    return self._kill(process, KILL_SECONDS)

    def _forward(self, pid: int, number: int) -> bool:
        """Forward a signal to the ranks. Return True if there are any."""
        ranks = ranks_below(pid)
        self._told |= {rank.pid for rank in ranks}
        if number not in FROM_TERMINAL:
            print_line(PROGRAM, f"{signal.Signals(number).name} goes to {len(ranks)} ranks")
        return send(ranks, signal.SIGTERM if number == signal.SIGHUP else number) > 0

    def _kill(self, process: subprocess.Popen[bytes], patience: float = 0.0) -> int:
        """Kill the launcher and all its descendants; with `patience`, first ask the launcher to end within seconds."""
        everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if patience:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        send(everything, signal.SIGKILL)
        process.wait()
        return -(self._first or signal.SIGTERM)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="Signals for the ranks of a job.")
    commands = parser.add_subparsers(required=True, dest="what")
    run = commands.add_parser("run", help="run a launcher; SIGTERM and SIGUSR1 go to its ranks")
    run.add_argument(
        "--grace", type=above_zero, default=GRACE_SECONDS, metavar="SECONDS",
        help="time limit for ranks to save and exit (default %(default)s)",
    )  # fmt: skip
    run.add_argument("--out", type=Path, metavar="DIR", help="the run's --out, for --unfinished")
    run.add_argument(
        "--unfinished", type=integer(0), default=0, metavar="STATUS",
        help="exit status if the launcher succeeded but the run in --out is unfinished (default %(default)s)",
    )  # fmt: skip
    run.add_argument("command", nargs=argparse.REMAINDER, help="the launcher and its arguments")
    tell = commands.add_parser("send", help="send a signal to the ranks on this machine")
    tell.add_argument("signal", choices=[number.name for number in SIGNALS])
    tell.add_argument("--port", type=integer(1), required=True, help="the job's MASTER_PORT")
    done = commands.add_parser("finished", help="exit with 0 if a run finished its last step")
    done.add_argument("out", type=Path, help="the run's --out")
    args = parser.parse_args(argv)
    if args.what == "run" and args.unfinished and args.out is None:
        raise MolsConfigError("--unfinished needs --out")
    if args.what == "run" and args.command[:1] == ["--"]:
        del args.command[0]
    if args.what == "run" and not args.command:
        raise MolsConfigError("run: no command")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return the launcher's status; 1 if `send` found no rank or a run is unfinished; 2 after a
    user error."""
    return run_program(PROGRAM, lambda: _command(_parse(argv)))


def _command(args: argparse.Namespace) -> int:
    if args.what == "run":
        return _run(args)
    if args.what == "finished":
        return 0 if finished(args.out) else FAILED
    count = send(ranks_here(args.port), signal.Signals[args.signal])
    if not count:
        print_line(PROGRAM, f"no rank of a job with MASTER_PORT {args.port} runs here as this user")
        return FAILED
    print_line(PROGRAM, f"{args.signal} {SENT} {count} ranks")
    return 0


def _run(args: argparse.Namespace) -> int:
    try:
        status = Supervisor(args.command, args.grace).run()
    except OSError as error:
        print_line(PROGRAM, f"{args.command[0]}: {error.strerror or error}")
        return COMMAND_NOT_FOUND
    if status == 0 and args.unfinished and not finished(args.out):
        print_line(PROGRAM, f"{args.out}: the run is not at its last step; start it again to continue")
        return int(args.unfinished)
    return status


if __name__ == "__main__":
    sys.exit(main())
