"""A port for the ranks that a test starts."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """Return a port below the kernel's ephemeral ports, which gloo's sockets could take before rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # hypothesis seeds the module's own
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
