"""Nodes of a cluster on one machine: network namespaces with one address each, joined by a bridge. Needs root.

On the loopback every interface reaches every process. Here a process that listens on the wrong one is not found, as on
a real network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

BRIDGE = "fedsim-br"


@dataclass(frozen=True)
class Node:
    """A namespace and its only address."""

    name: str
    address: str

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """A process of this node."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)  # type: ignore[call-overload,no-any-return]


def possible() -> bool:
    """Whether this process may make namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "fedsim-probe"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", "fedsim-probe"], capture_output=True)
    return made


@contextmanager
def network(size: int) -> Iterator[list[Node]]:
    """So many nodes, which see each other and nothing else, until the end of the block."""
    nodes = [Node(f"fedsim-{i}", f"10.213.0.{i + 1}") for i in range(size)]
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        for i, node in enumerate(nodes):
            _ip("netns", "add", node.name)
            _ip("link", "add", f"fedsim-p{i}", "type", "veth", "peer", "name", "eth0", "netns", node.name)
            _ip("link", "set", f"fedsim-p{i}", "master", BRIDGE, "up")
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", node.name, "link", "set", "eth0", "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for i, node in enumerate(nodes):
            for undo in (("link", "delete", f"fedsim-p{i}"), ("netns", "delete", node.name)):
                subprocess.run(["ip", *undo], capture_output=True)
        subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
