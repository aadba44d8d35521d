"""Optimizers by name: the table of names (names.py), how one is built for an engine (build.py), and those that read
whole tensors and yet work on ZeRO's flat shards (sharded.py)."""
