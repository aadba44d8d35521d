"""Start ranks: the launcher, its signals, health checks."""
