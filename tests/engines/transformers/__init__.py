"""Models of transformers: groups and optimizers on real classes, in one process and without an engine."""
