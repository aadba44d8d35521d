"""Stands for training where only signals matter, without torch: waits to be asked, saves and exits with 0.

Like ranks, the processes of one --out end together when one of them has heard SIGTERM, SIGUSR1 or SIGINT. Started with
--resume, it is at its last step at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

LIMIT = 60.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--deaf", action="store_true")
    args, _ = parser.parse_known_args()
    rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
    (args.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    if args.resume:
        (args.out / "metrics.jsonl").write_text(json.dumps({"final": True}) + "\n", "utf-8")
        return 0

    def note(number: int, frame: object) -> None:
        (args.out / f"heard.{rank}").write_text(signal.Signals(number).name, "utf-8")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if args.deaf else note)
    (args.out / f"ready.{rank}").write_text(str(os.getpid()), "utf-8")
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        if any(args.out.glob("heard.*")):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # as StopRequest does; Python's exit takes a handler off
            (args.out / "checkpoints" / "latest").write_text("step1", "utf-8")
            return 0
        time.sleep(0.05)
    return 3


if __name__ == "__main__":
    sys.exit(main())
