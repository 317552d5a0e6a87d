"""Federations on this machine: credentials, and how processes are started and ended (Flower's are scripts here)."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.common.config import get_fused_config_from_dir, parse_config_args

from fedsim import flower_cli
from fedsim.config import ConfigError
from fedsim.flower.clock import Patience
from fedsim.flower.credentials import write_credentials
from fedsim.flower.deployment import HOST, Deployment, deployed, setting
from fedsim.flower.door import MAX_EXAMPLES
from tests.fedsim.console import Outcome, fedsim
from tests.flower_live.deployment import free_port

QUADRATIC = """\
rounds: 1
task: {name: quadratic, a: [1, 3], b: [0, 1], x0: 2}
strategy: {name: fedavg}
local: {steps: 2, batch_size: full, optimizer: {name: sgd, lr: 0.1}}
"""
LISTEN = "import socket,sys,time; s=socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"
SCRIPTS = {
    "flower-superlink": f'exec {sys.executable} -S -c "{LISTEN}" $4',
    "flower-supernode": "exec sleep 60",
    "flwr": """case "$1 $2" in
        "supernode list") echo '{"nodes": [{"status": "online"}, {"status": "online"}]}';;
        "run "*) echo '{"run-id": "7"}';;
        "list "*) echo '{"runs": [{"run-id": "7", "status": "finished:completed", "status-details": ""}]}';;
    esac""",
}


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Flower's commands are scripts that note who they are in `calls`."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name, text in SCRIPTS.items():
        replace_script(folder, name, text)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    monkeypatch.chdir(tmp_path)
    Path("quadratic.yaml").write_text(QUADRATIC)
    return folder


def replace_script(folder: Path, name: str, text: str) -> None:
    script = folder / name
    script.write_text(f'#!/bin/sh\necho "$$ {name} $*" >> {folder}/calls\n{text}\n')
    script.chmod(0o755)


def deploy(*arguments: str) -> Outcome:
    assert fedsim("flower", "export", "quadratic.yaml", "app").code == 0
    return fedsim("flower", "deploy", "app", *arguments, "--port", str(free_port(3)))


def calls(folder: Path) -> list[tuple[int, str]]:
    """(process, command) of every call."""
    lines = (folder / "calls").read_text().splitlines()
    return [(int(number), command) for number, _, command in (line.partition(" ") for line in lines)]


def are_gone(folder: Path) -> bool:
    return not any(Path(f"/proc/{number}").exists() for number, _ in calls(folder))


def test_a_deployment_starts_what_it_shows_and_leaves_nobody_behind(scripts: Path) -> None:
    found = deploy("rounds=3", "--out", "run", "--resume")
    assert found.code == 0, found.err
    commands = [command for _, command in calls(scripts)]
    assert sum(command.startswith("flower-supernode") for command in commands) == 2
    assert [f"partition-id={i}" in c for c in commands for i in (0, 1) if c.startswith("flower-superno")].count(
        True
    ) == 2
    (submitted,) = (command for command in commands if command.startswith("flwr run"))
    out = Path("run").absolute()
    settings = f'fedsim-overrides="rounds=3" fedsim-out="{out}" fedsim-resume=true'
    assert submitted == f"flwr run app mine --format json -c {settings}"
    shown = [line for line in found.out.splitlines() if line.startswith("$")]
    assert len(shown) == 2 + 1 + 2 * 2 + 2 and shown[0].startswith("$ fedsim flower keys ")
    assert are_gone(scripts)


def test_settings_reach_flower_as_they_are(scripts: Path) -> None:
    override = """strategy.aggregator={"name": "median"} data.root='/a b/\\é😀'"""
    assert fedsim("flower", "export", "quadratic.yaml", "app").code == 0
    wanted = {"fedsim-overrides": override, "fedsim-out": '/a "b"', "fedsim-resume": True, "fedsim-max-examples": 7}
    wanted["fedsim-reply-seconds"] = 0.5
    text = " ".join(f"{key}={setting(value)}" for key, value in wanted.items())
    assert get_fused_config_from_dir(Path("app"), parse_config_args([text])) == wanted
    unchanged = get_fused_config_from_dir(Path("app"), {})
    assert unchanged["fedsim-max-examples"] == MAX_EXAMPLES
    assert unchanged["fedsim-reply-seconds"] == Patience().reply_seconds


def test_an_app_is_found_from_within_its_folder(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fedsim("flower", "export", "quadratic.yaml", "app").code == 0
    monkeypatch.chdir("app")
    assert fedsim("flower", "deploy", ".", "--port", str(free_port(3))).code == 0
    assert (scripts.parent / "app-federation" / "ca.crt").exists()


def test_whoever_does_not_wait_for_the_end_leaves_nobody_behind(tmp_path: Path) -> None:
    deaf = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo; sleep 60"], start_new_session=True, stdout=subprocess.PIPE
    )
    deployment = Deployment(tmp_path, 0, 1)
    deployment.processes |= {"impatient": mock.Mock(pid=deaf.pid), "deaf": deaf}
    deployment.processes["impatient"].wait = mock.Mock(side_effect=[KeyboardInterrupt, 0])
    with deaf, pytest.raises(KeyboardInterrupt):
        assert deaf.stdout is not None and deaf.stdout.readline() == b"\n"
        deployment.close()
    assert deaf.returncode == -signal.SIGKILL


def test_a_run_that_failed_is_said_so(scripts: Path) -> None:
    failed = SCRIPTS["flwr"].replace("completed", "failed").replace('details": ""', 'details": "it diverged"')
    replace_script(scripts, "flwr", failed)
    found = deploy()
    assert found.code == 1 and "the run is finished:failed: it diverged" in found.err
    assert are_gone(scripts)


def test_sigterm_ends_what_was_started(scripts: Path) -> None:
    replace_script(
        scripts,
        "flwr",
        SCRIPTS["flwr"].replace('"list "*)', '"log "*) sleep 1; kill -TERM $PPID; sleep 9;;\n"list "*)'),
    )
    assert deploy().code == 143
    assert are_gone(scripts)


def test_a_node_that_ends_is_named_with_what_it_said(scripts: Path) -> None:
    replace_script(scripts, "flwr", SCRIPTS["flwr"].replace("online", "registered"))
    replace_script(scripts, "flower-supernode", "echo unknown key; exit 1")
    found = deploy()
    assert found.code == 2 and "node0 has ended" in found.err and "unknown key" in found.err
    assert are_gone(scripts)


def test_a_node_that_does_not_join_is_waited_for_so_long(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.flower.deployment.START_SECONDS", 1.0)
    replace_script(scripts, "flwr", SCRIPTS["flwr"].replace("online", "registered"))
    with pytest.raises(ConfigError, match="after 1 seconds the nodes have not all joined"):
        with deployed(Path("federation"), 1, free_port(2), lambda command: None):
            pytest.fail("it is not up")
    assert are_gone(scripts)


def test_a_command_that_fails_is_shown_with_what_it_said(scripts: Path) -> None:
    replace_script(scripts, "flwr", "echo no such SuperLink >&2; exit 3")
    found = deploy()
    assert found.code == 2 and "flwr supernode register" in found.err and "no such SuperLink" in found.err
    assert are_gone(scripts)


@pytest.mark.parametrize("offset", [0, 2])
def test_ports_that_are_taken_are_named(offset: int, scripts: Path) -> None:
    port = free_port(3)
    with socket.create_server((HOST, port + offset)):
        with pytest.raises(ConfigError, match=rf"{port + offset} of .* taken; give the first of 3 with --port"):
            with deployed(Path("federation"), 2, port):
                pytest.fail("it is not up")
    assert not (scripts / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["elsewhere"], ["elsewhere holds no experiment", "fedsim flower export CONFIG elsewhere"]),
        (["app", "rouns=2"], ["rouns", "did you mean 'rounds'"]),
        (["app", "clients.byzantine={attack: sign_flip, count: 1}"], ["clients.byzantine: attacks are simulated"]),
        (["app", "task={name: quadratic, dim: 2}", "clients.count=21"], ["21 clients", "clients.count=2"]),
    ],
)
def test_mistakes_are_found_before_anything_starts(arguments: list[str], words: list[str], scripts: Path) -> None:
    assert fedsim("flower", "export", "quadratic.yaml", "app").code == 0
    found = fedsim("flower", "deploy", *arguments)
    assert found.code == 2 and all(word in found.err for word in words), found.err
    assert not (scripts / "calls").exists() and not Path("app-federation").exists()


@pytest.mark.parametrize("command", [["export", "quadratic.yaml", "app"], ["keys", "f"], ["deploy", "app"]])
def test_what_to_install_is_said(command: list[str], scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_cli, "version", mock.Mock(side_effect=flower_cli.PackageNotFoundError("flwr")))
    found = fedsim("flower", *command)
    assert found.code == 2 and "run pip install 'fedsim-stacks[flower]'" in found.err


def handshake(folder: Path, name: str) -> str | None:
    """What a client that trusts the authority says of the server under a name; None if all is well."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(back, there, server_hostname=name),
        server.wrap_bio(there, back, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as e:
                return e.verify_message
    return None if ends[0].version() else "no handshake"


def test_certificates_prove_the_server_and_nobody_else(tmp_path: Path) -> None:
    write_credentials(tmp_path, 1, ["fl.example.org", "10.0.0.7"])
    for name in ("localhost", "127.0.0.1", "fl.example.org", "10.0.0.7"):
        assert handshake(tmp_path, name) is None, name
    assert "mismatch" in str(handshake(tmp_path, "example.org"))


def test_a_certificate_that_does_not_serve_any_more_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_credentials(tmp_path, 1, ["fl.example.org"])
    write_credentials(tmp_path, 2, ["fl.example.org"])
    with pytest.raises(ConfigError, match=r"server.pem does not name other.example.org, 10.0.0.7; remove it"):
        write_credentials(tmp_path, 2, ["other.example.org", "fl.example.org", "10.0.0.7"])
    (tmp_path / "server.pem").unlink()
    monkeypatch.setattr("fedsim.flower.credentials.DAYS", 0)
    write_credentials(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"server.pem expired on \d{4}-\d\d-\d\d; remove it"):
        write_credentials(tmp_path, 1)


def test_keys_are_pairs_for_their_owner_alone_and_are_not_written_twice(tmp_path: Path) -> None:
    write_credentials(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_credentials(tmp_path, 3)
    assert {path: path.read_bytes() for path in before} == before
    for i in range(3):
        private = load_ssh_private_key((tmp_path / f"node{i}.key").read_bytes(), None)
        public = load_ssh_public_key((tmp_path / f"node{i}.pub").read_bytes())
        assert private.public_key() == public and private.key_size == 384
    assert {os.stat(path).st_mode & 0o777 for path in tmp_path.glob("*.key")} == {0o600}
    assert len(list(tmp_path.iterdir())) == 3 + 2 * 3
