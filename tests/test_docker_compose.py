"""docker-compose.yml says what docs/cluster.md says, and its commands form a cluster that runs a config."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.build import rows_in

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
MANUAL = (ROOT / "docs" / "cluster.md").read_text()
SUBMIT = SERVICES["submit"]["command"][-1].replace("$$CONFIG", "configs/quickstart.yaml").strip().splitlines()
COMMANDS = [SERVICES["head"]["command"], SERVICES["worker"]["command"], *SUBMIT]


@pytest.mark.parametrize("command", [*COMMANDS, " ".join(SERVICES["head"]["healthcheck"]["test"][1:])])
def test_every_command_stands_in_the_manual(command: str) -> None:
    assert command in MANUAL


def test_the_manual_names_the_services() -> None:
    assert set(SERVICES) == {"head", "worker", "submit"}
    assert "docker compose run --rm submit" in MANUAL and "--scale worker=" in MANUAL


def test_no_service_publishes_a_port() -> None:
    assert not any("ports" in service for service in SERVICES.values())


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_needs_the_token_and_has_shared_memory(name: str) -> None:
    service = SERVICES[name]
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert service["secrets"] == ["ray_token"]
    assert service["shm_size"].endswith("gb")
    assert service["image"] == SERVICES["head"]["image"], "one image: the same Python, Ray and fedsim everywhere"


def test_the_token_file_is_out_of_gits_sight() -> None:
    token = Path(COMPOSE["secrets"]["ray_token"]["file"])
    assert token.name in (ROOT / token.parent / ".gitignore").read_text().split()


def test_workers_are_replicated_and_wait_for_a_healthy_head() -> None:
    assert SERVICES["worker"]["deploy"]["replicas"] >= 2
    for name in ("worker", "submit"):
        assert SERVICES[name]["depends_on"]["head"]["condition"] == "service_healthy"


def test_the_build_context_holds_what_the_image_copies() -> None:
    lines = (ROOT / SERVICES["head"]["build"]["dockerfile"]).read_text().splitlines()
    kept = {line[1:] for line in (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]}
    assert copied == kept


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Any]:
    """Runs the services' commands side by side on this machine, on a port and in a folder of their own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ray_folder = tempfile.mkdtemp(prefix="fedsim-")  # not tmp_path: names of sockets must be short
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }

    def run(command: str) -> None:
        words = shlex.split(command.replace("head:6379", f"localhost:{port}").replace("6379", port))
        if words[:2] == ["ray", "start"]:
            words.append(f"--object-store-memory={100 << 20}")
        if "--head" in words:
            words.append(f"--temp-dir={ray_folder}")
        if words[:1] == ["fedsim"]:
            words = [sys.executable, "-m", "fedsim.cli", *words[1:]]
        words = [w.replace("address=auto", f"address=localhost:{port}") for w in words]  # others may run Ray here too
        with open(tmp_path / "log", "ab") as log:
            code = subprocess.run(words, cwd=ROOT, env=own, stdout=log, stderr=log, timeout=120).returncode
        assert code == 0, f"{command}: exit {code}\n{(tmp_path / 'log').read_text()}"

    yield run
    for process in psutil.process_iter(["cmdline"]):
        if any(ray_folder in word for word in process.info["cmdline"] or ()):
            process.kill()
    shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_services_commands_form_a_cluster_that_runs_a_config(machines: Any, tmp_path: Path) -> None:
    in_background = " --block"  # left out, the command returns when its node is up, and the node stays
    machines(SERVICES["head"]["command"].removesuffix(in_background))
    machines(" ".join(SERVICES["head"]["healthcheck"]["test"][1:]))
    machines(SERVICES["worker"]["command"].removesuffix(in_background) + " --num-cpus=1")
    join, run = SERVICES["submit"]["command"][-1].replace("$$CONFIG", "configs/quadratic.yaml").strip().splitlines()
    machines(join)
    out, here = tmp_path / "out", tmp_path / "here"
    machines(run.replace("runs/cluster", str(out)) + " rounds=3")
    machines(f"fedsim run configs/quadratic.yaml runtime.executor=in_process rounds=3 --out {here}")
    assert rows_in(out) == rows_in(here)
    assert len(rows_in(out)) >= 3
