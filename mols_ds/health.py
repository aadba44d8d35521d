"""`python -m mols_ds.health`: check a node before a run (docs/launching.md)."""

from mols_ds.apps.launch.health import main

if __name__ == "__main__":
    raise SystemExit(main())
