"""The parts of train_megatron.py: settings, model, data, checkpoints, the training loop."""
