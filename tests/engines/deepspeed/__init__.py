"""Tests on the real DeepSpeed with gloo ranks."""
