"""Nodes of a cluster on one machine: network namespaces with one address each, joined by a bridge. Needs root.

On the loopback every interface reaches every process. Here a process that listens on the wrong one is not found, as on
a real network. Names carry this process's number, so that several may have networks side by side.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

OURS = f"fs{os.getpid()}"
PORT = 29511
WITHOUT_TOKEN = {"RAY_AUTH_MODE": "disabled"}  # nobody else is in that network
NEW_NETWORK = 0x40000000  # Linux's CLONE_NEWNET


@dataclass(frozen=True)
class Node:
    """A namespace and its only address."""

    name: str
    address: str

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """A process of this node."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)  # type: ignore[call-overload,no-any-return]

    def enter(self) -> None:
        """Have this process, which must have one thread, see the node's network from now on."""
        libc, file = ctypes.CDLL(None, use_errno=True), os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        if libc.setns(file, NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"setns {self.name}")
        os.close(file)


def why_not() -> str | None:
    """Why this process can have no namespaces; None where it can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and the command ip"
    made = subprocess.run(["ip", "netns", "add", f"{OURS}-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", f"{OURS}-probe"], capture_output=True)
    return None if made.returncode == 0 else f"ip netns add: {made.stderr.strip()}"


@contextmanager
def network(size: int) -> Iterator[list[Node]]:
    """So many nodes, which see each other and nothing else, until the end of the block."""
    nodes = [Node(f"{OURS}-{i}", f"10.213.0.{i + 1}") for i in range(size)]
    try:
        _ip("link", "add", f"{OURS}b", "type", "bridge")
        _ip("link", "set", f"{OURS}b", "up")
        for i, node in enumerate(nodes):
            _ip("netns", "add", node.name)
            _ip("link", "add", f"{OURS}p{i}", "type", "veth", "peer", "name", "eth0", "netns", node.name)
            _ip("link", "set", f"{OURS}p{i}", "master", f"{OURS}b", "up")
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", node.name, "link", "set", "eth0", "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for i, node in enumerate(nodes):
            for undo in (("link", "delete", f"{OURS}p{i}"), ("netns", "delete", node.name)):
                subprocess.run(["ip", *undo], capture_output=True)
        subprocess.run(["ip", "link", "delete", f"{OURS}b"], capture_output=True)


@contextmanager
def ray_cluster(size: int, cpus: int = 1) -> Iterator[tuple[list[Node], str]]:
    """(nodes with a Ray node of so many CPUs each, the cluster's address)."""
    ray = str(Path(sys.executable).with_name("ray"))
    with ExitStack() as stack:
        nodes = stack.enter_context(network(size))
        address = f"{nodes[0].address}:{PORT}"
        for i, node in enumerate(nodes):
            role = ["--head", f"--port={PORT}", "--include-dashboard=false"] if i == 0 else [f"--address={address}"]
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{OURS}-", ignore_cleanup_errors=True))
            own = [f"--node-ip-address={node.address}", f"--temp-dir={folder}", f"--num-cpus={cpus}", "--num-gpus=0"]
            own += ["--object-store-memory=300000000", "--disable-usage-stats", "--block"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = node.start([ray, "start", *role, *own], env=os.environ | WITHOUT_TOKEN, **quiet)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
        yield nodes, address


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
