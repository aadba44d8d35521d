"""python -m tests.scenarios [--shrink] [--brief] SEED ...: run the scenarios of these seeds and print what differs.

A-B: the seeds from A to B. --brief: only the settings and the last lines. --shrink: also remove actions from a failing
scenario while it still fails.
"""

from __future__ import annotations

import sys
import time

from tests.scenarios.generate import generate
from tests.scenarios.runner import check, report, run_seeds, shrink

SHRINK_SECONDS = 120.0


def main(arguments: list[str]) -> int:
    seeds: list[int] = []
    for argument in arguments:
        if not argument.startswith("--"):
            first, _, last = argument.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    started = time.monotonic()
    reports = run_seeds(seeds)
    failed = [seed for seed in seeds if reports[seed]]
    for seed in failed:
        lines = reports[seed].splitlines()
        print("\n".join([lines[0], *lines[-4:]] if "--brief" in arguments else lines), end="\n\n")
        if "--shrink" in arguments:
            scenario = shrink(generate(seed), SHRINK_SECONDS)
            print(f"shortest failing scenario found:\n{report(scenario, check([scenario])[seed])}\n")
    seconds = time.monotonic() - started
    print(f"{len(seeds) - len(failed)} of {len(seeds)} scenarios match the reference, {seconds:.0f} s")
    if failed:
        print(f"seeds that failed: {' '.join(map(str, failed))}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
