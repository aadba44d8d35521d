"""Random valid scenarios of a run, compared with a single-process reference: `python -m tests.scenarios SEED`."""
