"""python -m tests.lives [--shrink] [--brief] SEED ...: live these lives and say what was wrong. A-B: from A to B."""

from __future__ import annotations

import sys
import time

from tests.lives.draw import draw
from tests.lives.running import judge, run_seeds, shrink, story

SHRINK_SECONDS = 120.0


def main(words: list[str]) -> int:
    seeds: list[int] = []
    for word in words:
        if not word.startswith("--"):
            first, _, last = word.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    begun = time.monotonic()
    stories = run_seeds(seeds)
    failed = [seed for seed in seeds if stories[seed]]
    for seed in failed:
        lines = stories[seed].splitlines()
        print("\n".join([lines[0], *lines[-4:]] if "--brief" in words else lines), end="\n\n")
        if "--shrink" in words:
            life = shrink(draw(seed), SHRINK_SECONDS)
            print(f"as short as it was made:\n{story(life, judge([life])[seed])}\n")
    print(f"{len(seeds) - len(failed)} of {len(seeds)} lives as the twin told, {time.monotonic() - begun:.0f} s")
    if failed:
        print(f"seeds that failed: {' '.join(map(str, failed))}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
