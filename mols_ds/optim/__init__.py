"""Optimizers by name: the catalog (catalog.py), how to build one for an engine (build.py), and optimizers that read
whole tensors but work on ZeRO's flat shards (sharded.py)."""
