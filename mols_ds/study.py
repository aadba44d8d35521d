"""`python -m mols_ds.study`: `mols-ds compare` as a launcher starts it on every rank."""

from mols_ds.apps.study.command import main

if __name__ == "__main__":
    raise SystemExit(main())
