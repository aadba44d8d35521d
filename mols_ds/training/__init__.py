"""Shared by the programs: training loop, checkpoints, data, models, command-line helpers."""
