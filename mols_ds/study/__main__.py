"""`python -m mols_ds.study`, for launchers."""

import sys

from mols_ds.study.command import main

if __name__ == "__main__":
    sys.exit(main())
