"""The ranks of a torchrun give the bits of the process itself; a mistake or a loss ends them with one message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from fedsim.compose.fleets import compute_device
from fedsim.config import ConfigError
from fedsim.runs import run
from fedsim.sim.collectives import interface_to
from fedsim.sim.executor import ClientError, Lost
from fedsim.sim.in_process import InProcess
from fedsim.sim.place import Place, take_gpu
from fedsim.strategies import STRATEGIES
from tests.build import rows_in
from tests.fedsim.sim import rank_cases
from tests.fedsim.sim.rank_cases import Rows, launch
from tests.fedsim.sim.ray_cases import assert_same_bits, runner, some_jobs

ROOT = Path(__file__).parents[3]
CALLS = {
    "folded": some_jobs(),
    "kept apart": some_jobs(fold=False),
    "from three models": some_jobs(fold=False, num_models=3),
    "of one client": some_jobs().rows(torch.tensor([2])),
    "of two clients": some_jobs().rows(torch.tensor([2, 5])),
    "of nobody": some_jobs().rows(torch.tensor([], dtype=torch.int64)),
}
SOME = ["fedavg", "scaffold_m", "monna", "fedbuff"]
WITHOUT_TORCHRUN = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks_gives_the_bits_of_the_process_itself(size: int) -> None:
    first, *others = launch(size, rank_cases.run_all, list(CALLS.values()))
    here = InProcess(runner(), width=1)
    for jobs, got in zip(CALLS.values(), first, strict=True):
        assert_same_bits(got, here.run(jobs))
    here.close()
    assert others == [[]] * (size - 1), "the others served, and went when rank 0 did"


@cache
def here(strategy: str) -> Rows:
    """The metrics of a short run in this process."""
    return rank_cases.rows([strategy])[0]


@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.alone) for n in (1, 2)), 3])
def test_strategies_give_the_metrics_of_one_process(size: int) -> None:
    (first, *_) = launch(size, rank_cases.rows, SOME)
    assert first == [here(strategy) for strategy in SOME]


def test_ranks_share_an_evaluation_and_give_the_metrics_of_one_process(tmp_path: Path) -> None:
    expected = rank_cases.evaluated(str(tmp_path / "here"))
    first, *_ = launch(3, rank_cases.evaluated, str(tmp_path / "there"))
    assert first == expected and {"test_attack_success", "client_accuracy_std"} <= expected[-1].keys()
    one, other = ((tmp_path / name / "clients.jsonl").read_bytes() for name in ("here", "there"))
    assert one == other


def test_an_exception_in_an_evaluation_is_raised_where_the_loop_is_and_the_next_call_works() -> None:
    first, *_ = launch(2, rank_cases.bad_pieces)
    assert "unexpected keyword argument 'nobody', then 4" in first


@pytest.mark.alone
def test_every_strategy_of_the_table_does() -> None:
    (first, *_) = launch(2, rank_cases.rows, list(STRATEGIES))
    assert first == [here(strategy) for strategy in STRATEGIES]


def test_a_client_halfs_exception_is_raised_where_the_loop_is_and_the_next_call_works() -> None:
    (error, odd, after), *_ = launch(3, rank_cases.run_all, [some_jobs("fail"), some_jobs("fail_oddly"), some_jobs()])
    assert isinstance(error, ClientError) and isinstance(odd, ClientError)
    assert (
        str(error) == "Toy.fail failed in round 5 for client(s) 7: ZeroDivisionError: client seven divides by nothing"
    )
    assert "LocalError: cannot be sent" in str(odd)
    executor = InProcess(runner(), width=1)
    assert_same_bits(after, executor.run(some_jobs()))
    executor.close()


def test_stacks_of_two_ranks_that_reply_other_fields_are_refused() -> None:
    error, _ = launch(2, rank_cases.run_uneven)
    assert isinstance(error, ClientError)
    assert "one stack replied delta [33], length [], more [] and another delta [33], length []" in str(error)


@pytest.mark.parametrize("where", ["broadcast", "agree", "fold", "send"])
def test_a_rank_that_is_killed_ends_the_run_for_all(where: str) -> None:
    first, killed, third = launch(3, rank_cases.run_and_die, 1, where)
    assert killed == signal.SIGKILL
    assert isinstance(first, Lost) and isinstance(third, Lost)
    assert "/" not in str(first), "no line of gloo's source"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"absent": 1}, "runtime.executor: rank 1 did not join within 3 s; start as many processes as WORLD_SIZE says"),
        ({"refusing": 2}, "rank 2: data.root: nothing there"),
        ({"odd": 2}, "runtime: rank 0 has stacks of 2, and rank 2 has stacks of 3, so their numbers would differ"),
    ],
)
def test_a_rank_that_does_not_join_is_one_message_of_rank_0(missing: dict[str, int], message: str) -> None:
    who = {"absent": None, "refusing": None, "odd": None} | missing
    said = launch(3, rank_cases.join_or_not, *who.values())
    assert said[0].startswith(f"ConfigError: {message}")
    assert "joined" not in said


def test_more_ranks_than_gpus_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.compose.fleets.place", lambda: Place(6, 2, 8, 4, "head"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the third rank of a node with two GPUs sees none
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    message = r"rank 6 has no GPU: 4 ranks run on this machine, and each takes one; start at most .*--nproc_per_node"
    with pytest.raises(ConfigError, match=f"^runtime.device: {message}"):
        compute_device("cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_rank_that_runs_two_experiments_keeps_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    for _ in range(2):
        take_gpu(Place(1, 1, 2, 2, "with two GPUs"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_the_interface_is_the_one_that_leads_to_the_host() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no.such.host.invalid") is None


CONFIG = """
rounds: 3
task: {name: quadratic, a: [1, 3, 2, 5, 4], b: [0, 1, 2, 3, 1], x0: 2}
local: {steps: 2, optimizer: {name: sgd, lr: 0.05}}
runtime: {stack: 1}
"""


def torchrun(*arguments: str, size: int = 2) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", "--standalone"]
    return subprocess.run(
        [*start, "-m", "fedsim", "run", *arguments],
        cwd=ROOT,
        env=WITHOUT_TORCHRUN | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.alone
def test_torchrun_runs_an_experiment_file_and_rank_0_alone_writes_and_prints(tmp_path: Path) -> None:
    file = tmp_path / "five.yaml"
    file.write_text(CONFIG)
    done = torchrun(str(file), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks of torchrun") == done.stdout.count("report: ") == 1
    run(file, out=tmp_path / "here")
    assert rows_in(tmp_path / "out") == rows_in(tmp_path / "here")


@pytest.mark.alone
def test_a_mistake_in_the_file_is_one_message_under_torchrun(tmp_path: Path) -> None:
    file = tmp_path / "five.yaml"
    file.write_text(CONFIG)
    done = torchrun(str(file), "local.steps=0", "--out", str(tmp_path / "out"), size=3)
    assert done.returncode == 1, "torchrun's own, whatever the ranks'"
    assert (
        done.stderr.count("fedsim: ") == 1 and f"fedsim: {file}: local: steps must be at least 1, got 0" in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_torchrun_that_is_named_must_have_started_the_process() -> None:
    with pytest.raises(ConfigError, match=r"torchrun was asked for but did not start this process; run `torchrun "):
        run({"task": {"name": "quadratic", "a": [1], "b": [0], "x0": 1}, "runtime": {"executor": "torchrun"}})


def test_another_executor_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="runtime.executor: in_process under torchrun would make 2 runs of one"):
        run({"task": {"name": "quadratic", "a": [1], "b": [0], "x0": 1}, "runtime": {"executor": "in_process"}})
