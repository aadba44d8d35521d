"""Megatron-core on a CPU, for tests and small runs."""
