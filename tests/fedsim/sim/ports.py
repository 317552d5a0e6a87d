"""Where processes listen, as the kernel has it."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path


def family() -> set[int]:
    """This process and all that it and they have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def addresses(processes: Collection[int]) -> set[str]:
    """Addresses at which these processes accept connections; of all interfaces it is 0.0.0.0 or ::."""
    held = set()
    for pid in processes:
        with suppress(OSError):
            held |= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    out = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[k] for k in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in held:  # it listens
                out.add(_shown(local.partition(":")[0]))
    return out


def _shown(words: str) -> str:
    """An address from the kernel's hexadecimal words, each in the machine's own order."""
    raw = b"".join(int(words[i : i + 8], 16).to_bytes(4, "little") for i in range(0, len(words), 8))
    kind = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(kind, raw).removeprefix("::ffff:")
