"""Two machines made of namespaces: each with a network, a host name and a list of hosts of its own, on one cable."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NAMES = ("node-a", "node-b")
_ADDRESSES = ("10.77.1.1", "10.77.1.2")
_KINDS = ("net", "uts", "mnt")


class TwoNodes:
    """Two nodes; each is there for as long as the process that holds its namespaces."""

    def __init__(self, holders: list[subprocess.Popen[bytes]]) -> None:
        self._holders = holders

    def on(self, node: int, *command: str) -> list[str]:
        """Return the words that run a command on a node, in the folder that they are run in."""
        target = f"--target={self._holders[node].pid}"
        return ["nsenter", target, "--net", "--uts", "--mount", f"--wd={Path.cwd()}", *command]

    def connect(self, hosts: Path) -> None:
        """Give the nodes names, addresses and a cable."""
        lines = [f"{address} {name}\n" for address, name in zip(_ADDRESSES, NAMES)]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        ends = [f"{holder.pid}" for holder in self._holders]
        _run("ip", "link", "add", "cable", "netns", ends[0], "type", "veth", "peer", "cable", "netns", ends[1])
        for node, (name, address) in enumerate(zip(NAMES, _ADDRESSES)):
            words = f"hostname {name}; mount --bind {hosts} /etc/hosts; ip address add {address}/24 dev cable"
            _run(*self.on(node, "sh", "-ec", f"{words}; ip link set lo up; ip link set cable up"))

    def cut(self) -> None:
        """Cut the cable: what is sent from here on is lost, and nobody is told."""
        _run(*self.on(1, "ip", "link", "set", "cable", "down"))


@contextmanager
def two_nodes(folder: Path) -> Iterator[TwoNodes]:
    """Make two nodes for as long as the body runs; skip the test where that is not allowed."""
    if os.geteuid() or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("nodes of namespaces need root, util-linux and iproute2")
    command = ["unshare", "--net", "--uts", "--mount", "sleep", "infinity"]
    holders = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in NAMES]
    nodes = TwoNodes(holders)
    try:
        if not all(map(_is_apart, holders)):
            pytest.skip("namespaces may not be made here")
        try:
            nodes.connect(folder / "hosts")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"namespaces may not be connected here: {error.stderr.strip()}")
        yield nodes
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _is_apart(holder: subprocess.Popen[bytes]) -> bool:
    """Wait until a process is in namespaces of its own; returns whether it came to that."""
    deadline = time.monotonic() + 10
    while holder.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            if all(os.readlink(f"/proc/{holder.pid}/ns/{k}") != os.readlink(f"/proc/self/ns/{k}") for k in _KINDS):
                return True
        time.sleep(0.01)
    return False


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
