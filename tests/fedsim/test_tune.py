"""Tuning: every candidate is measured on the run's own cohort, and the fastest is named as keys of the file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsim import tune as tuning
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.tune import Bench, Candidate, best, first_candidates, tune, worker_counts

CONFIG: dict[str, Any] = {
    "task": {
        "name": "classification",
        "dataset": {"name": "blobs", "num_examples": 300, "shape": [5]},
        "model": "logistic",
    },
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "clients": {"count": 12},
    "strategy": {"name": "fedavg", "cohort_size": 6},
    "local": {"epochs": 3, "batch_size": 5},
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.001)
    monkeypatch.setattr(tuning, "REPEATS", 1)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuning.task_of

    def made(samples: Any, plan: Any, *more: Any) -> Any:
        if plan.engine == "compiled":
            raise RuntimeError("no compiler here\nand more about it")
        return real(samples, plan, *more)

    monkeypatch.setattr(tuning, "task_of", made)


def test_candidates_are_the_rules_choice_the_loop_and_every_width_up_to_the_cohort() -> None:
    auto = Candidate("stacked", 6, 2)
    found = [(c.engine, c.stack) for c in first_candidates(auto, 6)]
    assert found == [("stacked", 6), ("loop", 1), ("stacked", 1), ("stacked", 2), ("stacked", 4)]
    assert [c.stack for c in first_candidates(auto, 1)] == [6, 1, 1]


def test_the_fastest_wins_and_the_first_of_equals() -> None:
    a, b, c = (Candidate("stacked", k, 1) for k in (1, 2, 3))
    assert best({a: 1.0, b: 5.0, c: 5.0}) == b


def test_workers_are_counted_up_to_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = compose(CONFIG, "x").experiment
    for cores, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert worker_counts(experiment) == expected
    assert worker_counts(replace(experiment, device=torch.device("cuda"))) == [2, 4, 1]


def test_a_table_comes_line_by_line_and_ends_with_the_keys_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)
    rates = iter(range(1000, 0, -1))  # each candidate slower than the one before: the rule's choice comes first
    monkeypatch.setattr(Bench, "settle", lambda self, candidate: None)
    real = Bench.rate

    def rate(self: Bench, candidate: Candidate, repeats: int = 1) -> float:
        real(self, candidate, 1)
        return float(next(rates))

    monkeypatch.setattr(Bench, "rate", rate)
    lines = list(tune(CONFIG, "x"))
    rows = [line.split() for line in lines if line.startswith(("stacked", "loop", "compiled"))]
    assert {row[0] for row in rows} == {"stacked", "loop", "compiled"}
    assert next(row for row in rows if row[0] == "compiled")[4:] == ["–", "no", "compiler", "here"]
    native, width, workers = rows[0][1:4]
    keys = f"runtime.engine=stacked runtime.native={native} runtime.stack={width} runtime.workers={workers}"
    assert f"fastest here: {keys}" in lines
    assert any(line.startswith("1.00 times the rate") for line in lines)


def test_the_keys_to_set_are_keys_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)
    line = next(line for line in tune(CONFIG, "x") if line.startswith("fastest here: "))
    keys = dict(part.split("=") for part in line.removeprefix("fastest here: ").split())
    runtime = {k.removeprefix("runtime."): v if k == "runtime.engine" else json.loads(v) for k, v in keys.items()}
    made = compose({**CONFIG, "runtime": runtime}, "x")
    made.close()
    assert made.resolved["runtime"]["engine"] == runtime["engine"]


def test_a_candidate_that_fails_without_a_word_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(self: Bench, candidate: Candidate) -> float:
        if candidate.engine != "stacked":
            raise RuntimeError
        return float(candidate.stack)

    monkeypatch.setattr(Bench, "settle", lambda self, candidate: None)
    monkeypatch.setattr(Bench, "rate", rate)
    rows = [line.split() for line in tune(CONFIG, "x")]
    assert [row[4:] for row in rows if row[0] in ("loop", "compiled")] == [["–"], ["–"]]
    assert any("runtime.engine=stacked" in row for row in rows)


def test_a_candidate_that_torch_warns_of_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a run has deterministic algorithms and not every operation has one."""

    def rate(self: Bench, candidate: Candidate) -> float:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))  # has none on any device
        return float(candidate.stack)

    monkeypatch.setattr(Bench, "settle", lambda self, candidate: None)
    monkeypatch.setattr(Bench, "rate", rate)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert not any("–" in line for line in tune(CONFIG, "x"))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_measuring_trains_the_first_cohort_as_the_run_would() -> None:
    bench = Bench(compose({**CONFIG, "runtime": {"workers": 1}}, "x"))
    drawn = bench.experiment.fleet.num_examples[bench.ids]
    assert 1 <= len(bench.ids) <= 6 and bool((drawn > 0).all())
    assert bench.most == 3 * int((drawn.max() + 4) // 5)
    bench.settle(Candidate("stacked", 4, 1))
    assert 1 <= bench.steps <= bench.most
    before = bench.samples.x0.clone()
    assert bench.rate(Candidate("loop", 1, 1)) > 0
    assert torch.equal(bench.samples.x0, before)


def test_a_run_without_engines_has_nothing_to_tune() -> None:
    with pytest.raises(ConfigError, match="nothing to choose; only local steps on samples"):
        list(tune({"task": "quadratic"}, "x"))
