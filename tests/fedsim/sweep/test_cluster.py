"""Trials as Ray tasks: on storage that a node shares and on storage that it does not, and lost workers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim import runs
from fedsim.sweep import Results, Sweep, Watch, cluster, parse_space, play
from fedsim.sweep.trials import Job
from tests.fedsim.console import fedsim
from tests.fedsim.sim.runtime import local_runtime

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray leaves log files and child processes to the interpreter's end
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUAD = """\
rounds: 4
task: {name: quadratic, dim: 3}
clients: {count: 5}
strategy: {name: fedavg}
local: {steps: 4, optimizer: {name: sgd, lr: 0.1}}
"""
MINE = """\
import os
from dataclasses import dataclass

from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class DiesOnce(FedAvg):
    marks: str = ""
    often: int = 1

    def round(self, s, fleet, rng):
        for k in range(self.often):
            mark = f"{self.marks}-{k}"
            if not os.path.exists(mark):
                open(mark, "w").close()
                os._exit(1)
        return super().round(s, fleet, rng)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("cluster")
    (root / "quad.yaml").write_text(QUAD)
    (root / "sweep_cluster_mine.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "path", [str(root), *sys.path])
        with local_runtime(num_cpus=2):
            yield root


def swept(out: str, *texts: str) -> Results:
    space = parse_space(texts, None, "quad.yaml")
    return play(Sweep(config=Path("quad.yaml"), space=space, folder=Path(out), address="auto", seeds=(1,)), Watch())


@pytest.mark.alone
def test_trials_have_the_bits_of_a_run_and_a_lost_worker_costs_nothing(folder: Path) -> None:
    mine = f"strategy={{name: 'sweep_cluster_mine:DiesOnce', marks: '{folder}/once'}}"
    found = swept("grid", f"{mine},fedavg")
    assert [record.ended.status for record in found.records] == ["done"] * 2
    assert (folder / "once-0").exists() and not list((folder / "grid").glob(".shared-*"))
    assert fedsim("run", "quad.yaml", "seed=1", "--out", "alone", "-q").code == 0
    model = "model.safetensors"
    assert (folder / "grid/strategy=fedavg,seed=1" / model).read_bytes() == (folder / "alone" / model).read_bytes()


def test_a_worker_that_is_always_lost_is_one_failed_trial(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = f"strategy={{name: 'sweep_cluster_mine:DiesOnce', marks: '{folder}/often', often: 99}}"
    monkeypatch.setattr(cluster, "ATTEMPTS", 2)
    found = swept("lost", mine)
    assert [record.ended.status for record in found.records] == ["failed"]
    assert "its worker was lost 2 times" in found.troubled[0].ended.why and (folder / "often-1").exists()


def test_where_the_folder_is_not_shared_the_files_come_home(tmp_path: Path) -> None:
    (tmp_path / "quad.yaml").write_text(QUAD)
    raw, source = runs.load(tmp_path / "quad.yaml", {})
    here = os.getcwd()
    ended, files = cluster.run_away(Job(raw, source, tmp_path / "run"), tmp_path / "no marker", here)
    assert ended.status == "done" and not (tmp_path / "run").exists()
    assert {"metrics.jsonl", "summary.json", "model.safetensors", "config.yaml"} <= set(files)
    assert json.loads(files["summary.json"])["rounds"] == 4


def test_no_cluster_at_the_address_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "quad.yaml").write_text(QUAD)
    import ray

    ray.shutdown()
    found = fedsim(
        "sweep", tmp_path / "quad.yaml", "rounds=1,2", "--address", "127.0.0.1:1", "--out", tmp_path / "grid"
    )
    assert found.code == 2 and "--address=127.0.0.1:1: cannot join a Ray cluster there" in found.err
    assert found.err.count("\n") == 1 and not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("threads", "0", "runtime: threads must be at least 1 or auto, got 0"),
        ("threads", "some", "runtime.threads: "),
        ("thread", "1", "runtime.thread: unknown key; did you mean 'threads'?"),
    ],
)
def test_nonsense_in_the_file_is_refused_before_a_cluster_is_joined(
    tmp_path: Path, key: str, value: str, words: str
) -> None:
    (tmp_path / "quad.yaml").write_text(QUAD)
    args = ("rounds=1,2", f"runtime.{key}={value}", "--address", "127.0.0.1:1", "--out", tmp_path / "grid")
    found = fedsim("sweep", tmp_path / "quad.yaml", *args)
    assert found.code == 2 and words in found.err and found.err.count("\n") == 1
    assert not (tmp_path / "grid").exists()
