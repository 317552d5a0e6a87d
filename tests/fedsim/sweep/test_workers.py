"""Trials in worker processes: their bits, what happens when one dies, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fedsim import runs
from fedsim.compose import compose
from fedsim.sweep.workers import serve
from tests.build import without_wall_time
from tests.fedsim.console import fedsim

ROOT = Path(__file__).parents[3]
# four stacks with four workers and one with one: a trial's single worker must not show
DIGITS = """\
rounds: 3
task: {name: classification, dataset: digits, model: {name: mlp, hidden: [200]}}
clients: {count: 100}
strategy: {name: fedavg}
local: {epochs: 1, batch_size: 20, optimizer: {name: sgd, lr: 0.1}}
runtime: {workers: 4}
evaluate: {every: 1}
"""
MINE = '''\
"""What a user might bring."""

import os
import signal
import time
from dataclasses import dataclass

from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class Dies(FedAvg):
    def round(self, s, fleet, rng):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Slow(FedAvg):
    def round(self, s, fleet, rng):
        time.sleep(0.5 if os.path.exists("slow") else 0)
        return super().round(s, fleet, rng)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "digits.yaml").write_text(DIGITS)
    (tmp_path / "sweep_workers_mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def rows(run: Path | str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_bits_are_those_of_a_run_and_a_process_that_dies_takes_its_own_trial_alone(folder: Path) -> None:
    raw, source = runs.load("digits.yaml", {})
    stacks = []
    for workers in (4, 1):
        composition = compose({**raw, "runtime": {"workers": workers}}, source)
        composition.close()
        stacks.append(composition.resolved["runtime"]["stacks"])
    assert stacks[0] > stacks[1]  # or the numbers of a trial would be right whatever it did
    names = "strategy.name=sweep_workers_mine:Dies,fedavg,scaffold"
    found = fedsim("sweep", "digits.yaml", names, "--seeds", "1", "--jobs", "2", "--out", "grid")
    assert found.code == 1 and "2 trials at a time, each in a process of its own" in found.out
    assert found.err.count("its process ended with signal 9 (SIGKILL); if memory ran out, lower --jobs") == 1
    assert "1 of 3 trials did not come to their end" in found.err
    for name in ("fedavg", "scaffold"):
        trial, alone = Path(f"grid/name={name},seed=1"), Path(f"alone-{name}")
        assert fedsim("run", "digits.yaml", f"strategy.name={name}", "seed=1", "--out", alone, "-q").code == 0
        assert (trial / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
        assert without_wall_time(rows(trial)) == without_wall_time(rows(alone))
        assert (trial / "report.html").exists()


@pytest.mark.slow
def test_ctrl_c_saves_stops_every_process_and_the_same_command_goes_on(folder: Path) -> None:
    args = ["digits.yaml", "strategy.name=sweep_workers_mine:Slow", "rounds=20", "checkpoint.every=null"]
    args += ["task.model=logistic", "clients.count=10"]
    (folder / "slow").touch()
    sweep = [*args, "--seeds", "0,1,2", "--out", "grid"]
    command = [sys.executable, "-m", "fedsim", "sweep", *sweep, "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        metrics = [folder / f"grid/seed={k}/metrics.jsonl" for k in (0, 1)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in metrics), process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130 and "0 of 3 trials done; the same command goes on" in err, err
    assert "Traceback" not in err and "leaked" not in err and "running trials finish their round and save" in out
    wait_until(lambda: not alive(process.pid))  # multiprocessing's own helper goes last
    done = {k: len(rows(f"grid/seed={k}")) for k in (0, 1)}
    assert all(0 < n < 20 for n in done.values()) and not (folder / "grid/seed=2").exists()
    for k, n in done.items():  # the checkpoint holds every row that was written
        assert [p.name for p in Path(f"grid/seed={k}/checkpoints").iterdir() if p.is_dir()] == [f"round-{n:06d}"]
    (folder / "slow").unlink()
    found = fedsim("sweep", *sweep, "--jobs", "1")
    assert found.code == 0 and found.out.count(": done, test_accuracy") == 3, found
    assert fedsim("run", *args, "seed=1", "--out", "alone", "-q").code == 0
    assert without_wall_time(rows("grid/seed=1")) == without_wall_time(rows("alone"))


def served_and_signalled(pipe: Connection) -> None:
    serve(pipe, None)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_worker_that_ends_by_itself_is_not_disturbed_by_the_signal_to_end() -> None:
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=served_and_signalled, args=(theirs,))
    process.start()
    theirs.close()
    ours.close()
    process.join(120)
    assert process.exitcode == 0


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
