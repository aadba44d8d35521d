"""Tests of mols_ds. The slow single-process reference is in `oracle`, the launcher of gloo ranks in `harness`."""
