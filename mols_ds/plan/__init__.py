"""`python -m mols_ds.plan.simulate` only; the program is mols_ds.apps.plan."""
