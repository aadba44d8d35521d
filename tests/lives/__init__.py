"""Random legal lives of a run, against a plain single-process twin: `python -m tests.lives SEED`."""
