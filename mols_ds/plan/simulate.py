"""`python -m mols_ds.plan.simulate`: which rank owns what (docs/evidence/simulated_ranks.md)."""

from mols_ds.apps.plan.simulate import main

if __name__ == "__main__":
    raise SystemExit(main())
