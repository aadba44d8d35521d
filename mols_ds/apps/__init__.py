"""The programs. They do not know each other."""
