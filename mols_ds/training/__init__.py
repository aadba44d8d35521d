"""What the programs share: the training loop, checkpoints, data, models, command-line helpers."""
