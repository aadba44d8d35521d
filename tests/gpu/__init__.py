"""Tests that need a CUDA device. They were written without one and had not been run when this was committed."""
