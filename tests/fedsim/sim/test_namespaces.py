"""Three machines with one address each, as network namespaces: what is out of reach at 127.0.0.1 fails here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.runs import run
from tests.fedsim.sim.test_ranks import CONFIG, ROOT, WITHOUT_TORCHRUN, rows_of

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="only root makes namespaces, by `ip`"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """Names of three namespaces on one bridge, with the addresses 10.77.0.1 to 10.77.0.3."""
    names = [f"fedsim{k}" for k in (1, 2, 3)]
    try:
        ip("link", "add", "fedsim0", "type", "bridge")
        ip("link", "set", "fedsim0", "up")
        for k, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("link", "add", f"{name}up", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}up", "master", "fedsim0", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{k}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", "fedsim0"], capture_output=True)


def test_a_torchrun_over_three_machines_gives_the_metrics_of_one_process(machines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "five.yaml"
    file.write_text(CONFIG)
    place = ["--nnodes=3", "--nproc_per_node=1", "--master_addr=10.77.0.1", "--master_port=29500"]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *place, f"--node_rank={rank}"]
            + ["-m", "fedsim", "run", str(file), "--out", str(tmp_path / "out")],
            cwd=ROOT,
            env=WITHOUT_TORCHRUN | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(machines)
    ]
    told = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], told
    assert [out.count("report: ") for out, _ in told] == [1, 0, 0]
    run(file, out=tmp_path / "here")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "here")
