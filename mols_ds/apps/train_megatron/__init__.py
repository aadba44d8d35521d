"""Parts of train_megatron.py: settings, model, data, checkpoints, backend."""
