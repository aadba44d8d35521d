"""Two hosts on this machine: network namespaces with an address, a host name and a hosts file each, and stand-ins for
the commands that reach one host from another (ssh, pdsh, srun, scontrol), which enter the namespace.

The hosts file is mounted over /etc/hosts for the processes of the two hosts alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

STAND_INS = Path(__file__).parent / "stand_ins"
NAMES = ("node01", "node02")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_numbers = itertools.count()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Hosts:
    """The two hosts. `folder` is what they share, and holds bin/, which comes first on PATH there."""

    folder: Path
    spaces: tuple[str, str]

    def command(self, host: int, *argv: str | Path) -> list[str]:
        """`argv` as it is run on a host."""
        return [str(self.folder / "bin" / "enter"), NAMES[host], *map(str, argv)]


def _namespaces(spaces: tuple[str, str]) -> None:
    """Connect two new namespaces by a cable."""
    cable = [f"mv{os.getpid() % 100000}x{end}" for end in "ab"]
    for space in spaces:
        _ip("netns", "add", space)
    # Made inside the first: the main namespace never sees it
    _ip("-n", spaces[0], "link", "add", cable[0], "type", "veth", "peer", "name", cable[1], "netns", spaces[1])
    for space, end, address in zip(spaces, cable, ADDRESSES, strict=True):
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", end)
        _ip("-n", space, "link", "set", end, "up")
        _ip("-n", space, "link", "set", "lo", "up")


def _remove(spaces: tuple[str, str]) -> None:
    """Kills what is left in the namespaces, which nobody else is in, and removes them; the cable goes with them."""
    for space in spaces:
        inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
        for pid in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        psutil.wait_procs([psutil.Process(int(pid)) for pid in inside if psutil.pid_exists(int(pid))], 10)
        subprocess.run(["ip", "netns", "del", space], capture_output=True)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts that share `folder`. Skips the test, with the reason, where this machine does not permit them."""
    for tool in ("ip", "nsenter", "unshare", "mount"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    number = next(_numbers)
    spaces = (f"mols{os.getpid()}n{number}a", f"mols{os.getpid()}n{number}b")
    try:
        try:
            _namespaces(spaces)
            hosts = Hosts(folder, spaces)
            _write(hosts)
            subprocess.run(hosts.command(0, "true"), check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield hosts
    finally:
        _remove(spaces)


def _write(hosts: Hosts) -> None:
    """bin/enter, the stand-ins, and what they read."""
    shutil.copytree(STAND_INS, hosts.folder / "bin")
    lines = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    (hosts.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n", "utf-8")
    for name, space in zip(NAMES, hosts.spaces, strict=True):
        (hosts.folder / f"space.{name}").write_text(space, "utf-8")
