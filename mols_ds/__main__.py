"""`python -m mols_ds`: the command `mols-ds`."""

from mols_ds.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
