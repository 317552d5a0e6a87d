"""A real SuperLink and SuperNodes on loopback: TLS, keys, processes of their own, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.flower_live.credentials import write_certificates, write_node_key

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind((HOST, 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class Deployment:
    """A SuperLink with node authentication, and its nodes.

    Args:
        folder: for keys, logs, and a home of its own for each process.
        num_nodes: SuperNodes; node i has partition-id i.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self._ports = free_ports(num_nodes + 2)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        write_certificates(folder)
        for i in range(num_nodes + 1):
            write_node_key(folder, f"node{i}")
        home = folder / "cli"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "tls"\n\n[superlink.tls]\naddress = "{self.address}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        try:
            self._start_link()
            for i in range(num_nodes):
                self.start_node(i)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return f"{HOST}:{self._ports[0]}"

    def _start_link(self) -> None:
        files = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
        place = ["--host", HOST, "--port", str(self._ports[0])]
        safe = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        self._start("link", ["flower-superlink", *files, *place, *safe])
        end = time.monotonic() + 90
        while self.cli("supernode", "list", "tls").returncode:
            assert self._processes["link"].poll() is None and time.monotonic() < end, self.log("link")
            time.sleep(0.5)

    def start_node(self, i: int, *, register: bool = True) -> subprocess.Popen[bytes]:
        """A SuperNode whose key the SuperLink knows, or not."""
        if register:
            done = self.cli("supernode", "register", str(self.folder / f"node{i}.pub"), "tls")
            assert done.returncode == 0, done.stdout
        link = [
            "--root-certificates",
            "ca.crt",
            "--superlink",
            self.address,
            "--auth-supernode-private-key",
            f"node{i}",
        ]
        own = ["--host", HOST, "--port", str(self._ports[i + 1])]
        own += ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt"]
        memory = self.folder / f"memory{i}"
        settings = ["--node-config", f"partition-id={i} fedsim-memory='{memory}'"]
        return self._start(f"n{i}", ["flower-supernode", *link, *own, *settings])

    def kill_node(self, i: int) -> None:
        """End a SuperNode and all that it started, without a word."""
        process = self._processes[f"n{i}"]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def kill_server_app(self) -> None:
        """End the process in which the SuperLink runs a ServerApp, which is known by the address it calls."""
        found = [int(f.name) for f in Path("/proc").iterdir() if f.name.isdigit() and self._is_server_app(f)]
        assert found, "no ServerApp is running"
        for process in found:
            os.kill(process, signal.SIGKILL)

    def _is_server_app(self, folder: Path) -> bool:
        try:
            command = (folder / "cmdline").read_text()
        except OSError:
            return False  # no process, or one that has ended meanwhile
        return "flwr-serverapp" in command and self.address in command

    def submit(self, app: Path, **settings: str | bool) -> str:
        """The number of a run that was started."""
        text = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in settings.items())
        done = self.cli("run", str(app), "tls", "-c", text)
        assert done.returncode == 0, done.stdout
        return done.stdout.split("Successfully started run")[1].split()[0]

    def wait(self, run: str, seconds: float) -> dict[str, Any]:
        """What Flower says of a run that has ended."""
        end = time.monotonic() + seconds
        while True:
            done = self.cli("list", "tls", "--format", "json")
            if done.returncode == 0:
                state = next(r for r in json.loads(done.stdout)["runs"] if r["run-id"] == run)
                if state["status"].startswith("finished"):
                    return state
            assert time.monotonic() < end, f"run {run} is still going\n" + self.log("link")
            time.sleep(1.5)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "flwr"), *arguments],
            env=self._environment("cli"),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )

    def log(self, name: str) -> str:
        """The end of a process's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-6000:]

    def close(self) -> None:
        """Stop everything: a friendly signal first, then none of them is left."""
        for process in reversed(self._processes.values()):
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its children, too
            except ProcessLookupError:
                pass
            process.wait(10)

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=self._environment(name),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def _environment(self, name: str) -> dict[str, str]:
        """Nobody calls out, and nobody shares a home."""
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
        paths = {"FLWR_HOME": str(self.folder / name), "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
        return {**os.environ, **quiet, **paths, "OMP_NUM_THREADS": "1"}
