"""`deepspeed --config FILE script.py`: DeepSpeed's own launcher with one more option.

The launcher's parser takes `--config`, so that every other option means what it always means and a `--config` behind
the script stays the script's. The file reaches the script as `--deepspeed --deepspeed_config FILE`: as arguments,
because environment variables do not travel to other nodes.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

USER_MISTAKE = 2
CONFIG_OPTIONS = ("--deepspeed_config", "--config")


class _Parser(argparse.ArgumentParser):
    """The launcher's parser plus `--config`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--config", dest="ds_config", metavar="FILE", help="DeepSpeed config, passed to the script")


def _argparse_with(parser: type[argparse.ArgumentParser]) -> ModuleType:
    """A copy of the module argparse whose ArgumentParser is `parser`."""
    module = ModuleType("argparse")
    module.__dict__.update(vars(argparse))
    module.__dict__["ArgumentParser"] = parser
    return module


def script_arguments(user_args: Sequence[str], config: str | None) -> list[str]:
    """The script's arguments with the config added, unless the user's own name one."""
    named = any(arg.split("=", 1)[0] in CONFIG_OPTIONS for arg in user_args)
    if config is None or named:
        return list(user_args)
    extra = ["--deepspeed_config", os.path.abspath(config)]
    return [*user_args, *([] if "--deepspeed" in user_args else ["--deepspeed"]), *extra]


def _mistake(message: str) -> None:
    print(f"deepspeed: {message}", file=sys.stderr, flush=True)
    sys.exit(USER_MISTAKE)


def _checked(parse: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
    """The launcher's `parse_args`, taking `--config` and refusing files that are not there."""

    def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
        from deepspeed.launcher import runner

        stock = runner.argparse
        runner.argparse = _argparse_with(_Parser)
        try:
            parsed = parse(args)
        finally:
            runner.argparse = stock
        if parsed.ds_config is not None and not os.path.isfile(parsed.ds_config):
            _mistake(f"--config {parsed.ds_config}: no such file")
        if not parsed.module and not parsed.no_python and not os.path.isfile(parsed.user_script):
            _mistake(f"{parsed.user_script}: no such script")
        parsed.user_args = script_arguments(parsed.user_args, parsed.ds_config)
        return parsed

    return parse_args


def _end_children(signum: int, frame: FrameType | None) -> None:
    """Hands SIGTERM on: the launcher's own handler covers several nodes only, and would leave local ranks running."""
    import psutil  # type: ignore[import-untyped]

    for child in psutil.Process().children():
        child.send_signal(signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs DeepSpeed's launcher on `argv` (default: the command line). Returns its status, or 2 for a user's mistake;
    the launcher itself hands on the status of the first process that failed."""
    from deepspeed.launcher import runner

    stock = runner.parse_args
    runner.parse_args = _checked(stock)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end_children)
    try:
        runner.main(None if argv is None else list(argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except (ValueError, RuntimeError, AssertionError) as error:  # how the launcher refuses hosts, slots and counts
        print(f"deepspeed: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return USER_MISTAKE
    finally:
        runner.parse_args = stock
    return 0
