"""python -m tests.fuzz [--examples N] [--seed S]: prints target, cases, refused, accepted, failures."""

from __future__ import annotations

import argparse
import sys

from tests.helpers.harness import RANK_ENVIRONMENT, apply_environment

apply_environment(RANK_ENVIRONMENT)

from tests.tools.fuzz.run import run_all, table  # noqa: E402  (reads the environment when torch is imported)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz this package's inputs.")
    parser.add_argument("--examples", type=int, help="cases of all targets together (default: the short form's)")
    parser.add_argument("--seed", type=int, help="other cases than those of CI")
    args = parser.parse_args()
    outcomes = run_all(args.examples, args.seed)
    print(table(outcomes))
    for outcome in outcomes:
        if outcome.failure:
            print(f"\n{outcome.name}: {outcome.failure}")
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
