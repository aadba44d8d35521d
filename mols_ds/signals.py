"""`python -m mols_ds.signals`: pass signals on to ranks (docs/launching.md)."""

from mols_ds.apps.launch.signals import main

if __name__ == "__main__":
    raise SystemExit(main())
