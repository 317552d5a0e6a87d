"""Nodes with one address each give the numbers of one process: ranks, and Ray workers by either plane."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.sim.in_process import InProcess
from tests.build import rows_in
from tests.fedsim.sim import rank_cases
from tests.fedsim.sim.namespaces import PORT, WITHOUT_TOKEN, Node, network, ray_cluster, why_not
from tests.fedsim.sim.rank_cases import launch
from tests.fedsim.sim.ray_cases import assert_same_bits, runner, some_jobs

pytestmark = pytest.mark.skipif((reason := why_not()) is not None, reason=str(reason))

ROOT = Path(__file__).parents[3]
ALONE = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ALONE |= {"OMP_NUM_THREADS": "1", **WITHOUT_TOKEN}
CONFIG = """
rounds: 4
task: {name: classification, dataset: {name: blobs, num_examples: 300}, model: {name: mlp, hidden: [8]}}
clients: {count: 6}
strategy: {name: scaffold_m, cohort_size: 5}
local: {steps: 2, batch_size: 10, optimizer: {name: sgd, lr: 0.05}}
evaluate: {every: 2}
runtime: {stack: 1, workers: 1}
"""


def test_workers_find_each_other_where_each_has_one_address() -> None:
    calls = [some_jobs(), some_jobs(fold=False, num_models=3), some_jobs()]
    with network(3) as nodes:
        first, *others = launch(3, rank_cases.run_all, calls, nodes=nodes)
    here = InProcess(runner(), width=1)
    for jobs, got in zip(calls, first, strict=True):
        assert_same_bits(got, here.run(jobs))
    here.close()
    assert others == [[], []]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An experiment, of which this machine alone has made `here`."""
    made = tmp_path / "six.yaml"
    made.write_text(CONFIG)
    command = [sys.executable, "-m", "fedsim", "run", str(made), "--out", str(tmp_path / "here")]
    subprocess.run(command, cwd=ROOT, env=ALONE, check=True, capture_output=True)
    return made


def fedsim(node: Node, *command: str) -> subprocess.Popen[str]:
    """A process of a node, with fedsim's command line behind some others."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return node.start([sys.executable, "-m", *command], cwd=ROOT, env=ALONE, **quiet)


def ended(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, what it wrote to stderr) of each."""
    try:
        said = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.mark.alone
@pytest.mark.slow
def test_a_torchrun_on_three_nodes(file: Path, tmp_path: Path) -> None:
    start = ["torch.distributed.run", "--nnodes=3", "--nproc_per_node=1", f"--master_port={PORT}"]
    run = ["-m", "fedsim", "run", str(file), "--out", str(tmp_path / "there")]
    with network(3) as nodes:
        start.append(f"--master_addr={nodes[0].address}")
        found = ended([fedsim(node, *start, f"--node_rank={i}", *run) for i, node in enumerate(nodes)])
    assert [code for code, _ in found] == [0, 0, 0], found
    assert rows_in(tmp_path / "there") == rows_in(tmp_path / "here")


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.ray
def test_ray_workers_on_three_nodes_by_either_plane(file: Path, tmp_path: Path) -> None:
    with ray_cluster(3) as (nodes, address):
        for plane in ("gloo", "object_store"):
            run = ["fedsim", "run", str(file), "--out", str(tmp_path / plane), "runtime.executor=ray"]
            options = ["runtime.workers=3", f"runtime.address={address}", f"runtime.collectives={plane}"]
            ((code, said),) = ended([fedsim(nodes[0], *run, *options)])
            assert code == 0 and "dissolved" not in said and "lost" not in said, said
            assert rows_in(tmp_path / plane) == rows_in(tmp_path / "here")
