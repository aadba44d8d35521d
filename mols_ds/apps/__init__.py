"""The programs. None imports another."""
