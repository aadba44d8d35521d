"""Fuzzing with hypothesis: `python -m tests.fuzz` prints what was tried and what came of it."""
