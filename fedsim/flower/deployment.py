"""A federation on this machine: a SuperLink with TLS and keys, and its SuperNodes, as processes on loopback.

Every command is shown before it is run, as a shell takes it, so that it can be copied to other machines.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedsim.config import ConfigError
from fedsim.flower.credentials import write_credentials

HOST = "127.0.0.1"
PROFILE = "mine"  # what the command line calls the SuperLink
SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # Flower calls out otherwise
START_SECONDS = 120.0  # until a process that was started is there
END_SECONDS = 20.0  # until one that was asked to end is killed

Settings = Mapping[str, str | int | float | bool]


class Deployment:
    """See the module's head; ends all of `processes`, which it started, when it is closed.

    Args:
        folder: for keys, logs, devices' memory, and a home of its own for each process.
        num_nodes: how many SuperNodes; node i is client i.
        port: the SuperLink's; those of the nodes follow it.
        show: gets every command.
    """

    def __init__(self, folder: Path, num_nodes: int, port: int, show: Callable[[str], None] = print) -> None:
        self.folder, self.num_nodes, self.port = folder.absolute(), num_nodes, port
        self._show = show
        self._scripts = sysconfig.get_path("scripts")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring up the SuperLink and its nodes, and wait until all of them have joined.

        Raises:
            ConfigError: if a port is taken, or a process is not there in time.
        """
        check_ports(range(self.port, self.port + self.num_nodes + 1))
        self._show(f"$ fedsim flower keys {shlex.quote(str(self.folder))} --nodes {self.num_nodes}")
        write_credentials(self.folder, self.num_nodes)
        self._show("$ export " + " ".join(f"{k}={v}" for k, v in SILENT.items()))
        self._start_link()
        for i in range(self.num_nodes):
            self.register(i)
            self.start_node(i)
        self._await("the nodes have not all joined", [f"node{i}" for i in range(self.num_nodes)], self._all_joined)

    def register(self, i: int) -> None:
        """Make a node's public key known to the SuperLink."""
        self.cli("supernode", "register", str(self.folder / f"node{i}.pub"), PROFILE)

    def start_node(self, i: int) -> subprocess.Popen[bytes]:
        """Start a SuperNode that is to be client i."""
        own = ["--superlink", f"{HOST}:{self.port}", "--root-certificates", str(self.folder / "ca.crt")]
        own += ["--auth-supernode-private-key", str(self.folder / f"node{i}.key")]
        settings = f"partition-id={i} fedsim-memory={setting(str(self.folder / f'memory{i}'))}"
        place = ["--host", HOST, "--port", str(self.port + 1 + i)]  # for processes of the device's own
        return self._start(f"node{i}", ["flower-supernode", *own, *place, "--node-config", settings])

    def submit(self, app: Path, settings: Settings) -> str:
        """The number of a run that was started."""
        text = " ".join(f"{key}={setting(value)}" for key, value in settings.items())
        said = self.cli("run", str(app), PROFILE, "--format", "json", *(["-c", text] if text else []))
        run: str = said["run-id"]
        return run

    def follow(self, run: str) -> None:
        """Show what the ServerApp of a run prints, until it ends."""
        self._run(["flwr", "log", run, PROFILE, "--stream"])

    def status(self, run: str) -> dict[str, Any]:
        """What Flower says of a run; `status` begins with "finished" when it has ended."""
        runs = self.cli("list", PROFILE, "--format", "json", shown=False)["runs"]
        return next(r for r in runs if r["run-id"] == run)

    def cli(self, *arguments: str, shown: bool = True) -> dict[str, Any]:
        """What a command of `flwr` answers, in JSON if it is asked for.

        Raises:
            ConfigError: if it fails.
        """
        done = self._run(["flwr", *arguments], shown, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"flwr {shlex.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout) if "json" in arguments else {}
        return answer

    def log(self, name: str) -> str:
        """The end of a process's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """Stop everything: a friendly signal first, then none of them is left; a second Ctrl-C ends them at once."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + END_SECONDS
        try:
            with suppress(subprocess.TimeoutExpired):
                for process in self.processes.values():
                    process.wait(end - time.monotonic())
        finally:
            for process in self.processes.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its children, too
                process.wait()

    def _start_link(self) -> None:
        files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.crt"}
        tls = [part for name, file in files.items() for part in (f"--ssl-{name}", str(self.folder / file))]
        safe = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        self._start("link", ["flower-superlink", "--host", HOST, "--port", str(self.port), *tls, *safe])
        home = self.folder / "cli"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{PROFILE}"\n\n[superlink.{PROFILE}]\naddress = "{HOST}:{self.port}"\n'
            f"root-certificates = {json.dumps(str(self.folder / 'ca.crt'))}\n"
        )
        self._show(f"# {home / 'config.toml'} says that {PROFILE!r} is the SuperLink at {HOST}:{self.port}")
        self._await("the SuperLink is not there", ["link"], lambda: is_taken(self.port))

    def _all_joined(self) -> bool:
        nodes = self.cli("supernode", "list", PROFILE, "--format", "json", shown=False)["nodes"]
        return sum(node["status"] == "online" for node in nodes) >= self.num_nodes

    def _await(self, otherwise: str, names: list[str], there: Callable[[], bool]) -> None:
        """Wait for what processes do.

        Raises:
            ConfigError: if one of them ends, or it takes too long.
        """
        end = time.monotonic() + START_SECONDS
        while not there():
            ended = next((name for name in names if self.processes[name].poll() is not None), None)
            if ended or time.monotonic() > end:
                why = f"{ended} has ended" if ended else f"after {START_SECONDS:.0f} seconds {otherwise}"
                name = ended or names[-1]
                raise ConfigError(f"{why}; the end of {self.folder / name}.log:\n{self.log(name)}")
            time.sleep(0.5)

    def _run(self, command: list[str], shown: bool = True, **streams: Any) -> subprocess.CompletedProcess[str]:
        if shown:
            self._show(f"$ FLWR_HOME={shlex.quote(str(self.folder / 'cli'))} {shlex.join(command)}")
        return subprocess.run([f"{self._scripts}/{command[0]}", *command[1:]], env=self._environment("cli"), **streams)

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        home, log = self.folder / name, self.folder / f"{name}.log"
        self._show(f"$ FLWR_HOME={shlex.quote(str(home))} {shlex.join(command)} > {shlex.quote(str(log))} 2>&1 &")
        with log.open("wb") as file:
            self.processes[name] = subprocess.Popen(
                [f"{self._scripts}/{command[0]}", *command[1:]],
                env=self._environment(name),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for whoever runs this, who ends them in order
            )
        return self.processes[name]

    def _environment(self, name: str) -> dict[str, str]:
        """Nobody calls out, nobody shares a home, and all find Flower's commands, a venv's without its being active."""
        own = {"FLWR_HOME": str(self.folder / name), "PATH": f"{self._scripts}:{os.environ.get('PATH', os.defpath)}"}
        return {**os.environ, **SILENT, **own, "PYTHONUNBUFFERED": "1"}


@contextmanager
def deployed(folder: Path, num_nodes: int, port: int, show: Callable[[str], None] = print) -> Iterator[Deployment]:
    """A deployment that is up inside, and gone after."""
    deployment = Deployment(folder, num_nodes, port, show)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.close()


def setting(value: str | int | float | bool) -> str:
    """A value as Flower's command line takes it: as TOML has it, but for quotation marks within, which end it there."""
    return json.dumps(value, ensure_ascii=False).replace('\\"', "\\u0022")


def is_taken(port: int) -> bool:
    """Whether somebody listens at a port of loopback."""
    with socket.socket() as s:
        return s.connect_ex((HOST, port)) == 0


def check_ports(ports: range) -> None:
    """Refuse ports at which somebody listens."""
    taken = [str(port) for port in ports if is_taken(port)]
    if taken:
        raise ConfigError(f"port(s) {', '.join(taken)} of {HOST} are taken; give the first of {len(ports)} with --port")
