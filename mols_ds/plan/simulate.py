"""`python -m mols_ds.plan.simulate`: which rank owns what (docs/evidence/simulated_ranks.md). In a checkout alone."""

import sys

from mols_ds.apps.plan.command import simulator
from mols_ds.training.cli_utils import run_program

if __name__ == "__main__":
    sys.exit(run_program("simulate", lambda: simulator().main()))
