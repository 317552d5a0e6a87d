"""Deployments that tests start, and whose processes they kill."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedsim.flower.deployment import HOST, Deployment, deployed, is_taken
from tests.build import Rows

ROOT = Path(__file__).parents[2]


@contextmanager
def deployment_in(folder: Path, num_nodes: int) -> Iterator[Deployment]:
    """A deployment whose processes import the fedsim that is tested."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}.items():
            patch.setenv(name, value)
        with deployed(folder, num_nodes, free_port(num_nodes + 2)) as deployment:
            yield deployment


def free_port(count: int) -> int:
    """The first of some ports of loopback at which nobody listens."""
    while True:
        port = random.randrange(20000, 30000)
        if not any(map(is_taken, range(port, port + count))):
            return port


def rows_of(folder: Path) -> Rows:
    """What a run has written so far."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(deployment: Deployment, holds: Callable[[], bool], seconds: float = 400) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, deployment.log("link")
        time.sleep(0.2)


def wait(deployment: Deployment, run: str, seconds: float) -> dict[str, Any]:
    """What Flower says of a run that has ended."""
    end = time.monotonic() + seconds
    while True:
        state = deployment.status(run)
        if state["status"].startswith("finished"):
            return state
        assert time.monotonic() < end, f"run {run} is still going\n" + deployment.log("link")
        time.sleep(1.5)


def completed(deployment: Deployment, run: str, seconds: float) -> dict[str, Any]:
    """The same of a run that has to come to its end."""
    state = wait(deployment, run, seconds)
    assert state["status"] == "finished:completed", state["status-details"] + deployment.log("link")
    return state


def kill_node(deployment: Deployment, i: int) -> None:
    """End a SuperNode and all that it started, without a word."""
    process = deployment.processes[f"node{i}"]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_server_app(deployment: Deployment) -> None:
    """End the process in which the SuperLink runs a ServerApp, which is known by the address it calls."""
    address = f"{HOST}:{deployment.port}"
    found = [int(f.name) for f in Path("/proc").iterdir() if f.name.isdigit() and _is_server_app(f, address)]
    assert found, "no ServerApp is running"
    for process in found:
        os.kill(process, signal.SIGKILL)


def _is_server_app(folder: Path, address: str) -> bool:
    try:
        command = (folder / "cmdline").read_text()
    except OSError:
        return False  # no process, or one that has ended meanwhile
    return "flwr-serverapp" in command and address in command
