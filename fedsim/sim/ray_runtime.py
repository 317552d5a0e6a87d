"""Starting a Ray runtime on this machine, or joining a cluster, and what its workers need to know of this process."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def connect(
    ray: Any,
    address: str | None,
    workers: int | None,
    threads: int,
    gpus: int,
    setting_bytes: int,
    key: str = "runtime.address",
) -> bool:
    """Start or join a runtime; True if it has to be shut down later because it was not there before.

    Raises:
        ValueError: if there is none at the address, which the user gave as `key`.
    """
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray._private.worker._worker_logs_enabled = False  # the same of a lost node, whatever log_to_driver is
    ours = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            try:
                _probe(address)
                ray.init(address=address, **quiet)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{key}={address}: cannot join a Ray cluster there ({error}); start one with `ray start "
                    "--head` or leave the address out"
                ) from error
        else:
            # a token of this process alone keeps strangers out of the runtime and leaves no file in the user's home
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            cpus = len(os.sched_getaffinity(0)) if workers is None else workers * threads
            with _on_loopback(ray):
                ray.init(
                    address="local",
                    num_cpus=max(cpus, threads),
                    num_gpus=None if gpus else 0,
                    object_store_memory=(512 << 20) + 2 * setting_bytes,
                    include_dashboard=False,
                    **quiet,
                )
    finally:
        if ours is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # ray.init puts its own handler there
    return True


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Have a runtime that starts listen to this machine alone, as it does by itself where firewalls ask about it."""
    name, constants = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray._private.ray_constants
    before, os.environ[name] = os.environ.get(name), "0"  # for its processes
    cluster, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False  # for this one, which has read it
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = cluster
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _probe(address: str) -> None:
    """OSError if nobody listens at host:port, which ray.init would try for many minutes."""
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = place.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def environment(threads: int) -> dict[str, str]:
    """What workers need to import the same modules as this process, from the same places."""
    installed = ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
    library = {Path(sysconfig.get_path(name)).resolve() for name in installed}
    own = [Path(p or ".").resolve() for p in sys.path]
    path = [str(p) for p in own if p.is_dir() and not any(p == e or e in p.parents for e in library)]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "OMP_NUM_THREADS": str(threads)}
