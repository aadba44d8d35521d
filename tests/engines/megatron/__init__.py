"""Tests on the real megatron-core, on CPU tensors and gloo."""
