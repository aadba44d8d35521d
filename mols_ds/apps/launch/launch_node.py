"""DeepSpeed's launcher of one node (launcher/launch.py), which a Ctrl-C does not end.

Its own handler ends the ranks one by one. The ranks hear the Ctrl-C themselves, save and end; then it ends too.
Imports nothing of this package, which need not be installed.
"""

from __future__ import annotations

import runpy
import signal
import sys
from types import FrameType
from typing import Any


def hear_nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing. Unlike SIG_IGN, it is not inherited by the ranks."""


def main() -> None:
    """Run the launcher with the command line of this process."""
    stock = signal.signal

    def set_handler(number: int, handler: Any) -> Any:
        return stock(number, hear_nothing if number == signal.SIGINT else handler)

    signal.signal = set_handler  # type: ignore[assignment]
    sys.path[0] = ""
    runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
