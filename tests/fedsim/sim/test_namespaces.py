"""Three nodes with one address each give the metrics of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build import rows_in
from tests.fedsim.sim.namespaces import Node, network, possible

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="needs root and `ip netns`"),
]

ROOT = Path(__file__).parents[3]
CONFIG = """
rounds: 4
task: {name: classification, dataset: {name: blobs, num_examples: 300}, model: {name: mlp, hidden: [8]}}
clients: {count: 6}
strategy: {name: scaffold_m, cohort_size: 5}
local: {steps: 2, batch_size: 10, optimizer: {name: sgd, lr: 0.05}}
runtime: {stack: 1, workers: 1}
"""


def torchrun(nodes: list[Node], *arguments: str) -> list[subprocess.Popen[str]]:
    """One rank on every node, as Slurm starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(nodes)}", "--nproc_per_node=1"]
    command += [f"--master_addr={nodes[0].address}", "--master_port=29511"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return [
        node.start(
            [*command, f"--node_rank={i}", "-m", "fedsim", "run", *arguments],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i, node in enumerate(nodes)
    ]


def test_ranks_on_nodes_with_one_address_each_find_each_other(tmp_path: Path) -> None:
    file = tmp_path / "six.yaml"
    file.write_text(CONFIG)
    command = [sys.executable, "-m", "fedsim", "run", str(file), "--out", str(tmp_path / "here")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with network(3) as nodes:
        started = torchrun(nodes, str(file), "--out", str(tmp_path / "there"))
        try:
            ended = [(process.communicate(timeout=200), process.returncode) for process in started]
        finally:
            for process in started:
                process.kill()
                process.communicate()
    assert [code for _, code in ended] == [0, 0, 0], ended
    assert rows_in(tmp_path / "there") == rows_in(tmp_path / "here")
