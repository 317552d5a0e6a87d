"""The loop: rows, stops, evaluation, divergence and interruptions, with a strategy that does nothing of its own."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.checkpoint import fingerprint
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.evaluation import Evaluate
from fedsim.experiment import Checkpoint, Experiment
from fedsim.loop import Interrupted, Run, ServerError
from fedsim.signals import interruptible
from fedsim.sinks import JsonLines
from fedsim.stop import Diverged, Patience, Stop
from tests.build import train


@dataclass(frozen=True)
class State:
    x: Tensor
    steps: int = 0


@dataclass
class Walk:
    """Moves the model by a fixed step each round and does what it is told to in some rounds."""

    step: float = -0.25
    then: dict[int, Any] = field(default_factory=dict)
    saw: list[tuple[int, float]] = field(default_factory=list)

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: Any, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        self.saw.append((fleet.round, rng.random()))
        number = s.steps + 1
        action = self.then.get(number)
        if isinstance(action, Exception):
            raise action
        x = s.x + self.step if action is None else torch.full_like(s.x, action)
        return State(x, number), {"own": number}


class Ticking(Walk):
    """Walks, and each round takes a second."""

    def round(self, s: State, fleet: Any, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        fleet.receive(until=fleet.now + 1)
        return super().round(s, fleet, rng)


def experiment(strategy: Any = None, rounds: int = 8, **fields: Any) -> Experiment:
    """Two clients whose solution is 0.75, from 2, and a strategy that walks."""
    raw = {"task": {"name": "quadratic", "a": [1, 3], "b": [0, 1], "x0": 2}, "runtime": {"workers": 1}}
    made = compose(raw, "test")
    made.close()
    fields = {"evaluate": Evaluate(every=3), "config": {"seed": 0}, **fields}
    return replace(made.experiment, strategy=strategy or Walk(), rounds=rounds, **fields)


def test_a_row_a_round_with_evaluation_every_so_often_and_at_the_end() -> None:
    state, rows, why = train(experiment())
    assert [row["round"] for row in rows] == list(range(1, 9)) and why == "all 8 rounds done"
    assert [row["round"] for row in rows if "distance" in row] == [3, 6, 8]
    # 2 - 0.25 t is 0.75 away from the solution at t = 2 already passed: at 3, 6 and 8 it is 0.5, -0.25 and -0.75 away
    assert [row["distance"] for row in rows if "distance" in row] == pytest.approx([0.5, 0.25, 0.75])
    assert rows[2]["x"] == pytest.approx([1.25]) and float(state.x) == 0.0 and rows[7]["own"] == 8


def test_every_round_has_its_own_number_and_generator_whatever_came_before() -> None:
    first, second = Walk(), Walk()
    train(experiment(first))
    train(experiment(second, rounds=3))
    assert [k for k, _ in first.saw] == list(range(8)) and len({u for _, u in first.saw}) == 8
    assert second.saw == first.saw[:3]
    other = Walk()
    train(experiment(other, seed=1))
    assert not {u for _, u in other.saw} & {u for _, u in first.saw}


def test_wall_time_rises_and_totals_are_there() -> None:
    rows = train(experiment())[1]
    walls = [row["wall_seconds"] for row in rows]
    assert walls == sorted(walls) and walls[0] > 0
    assert {"virtual_seconds", "bits_up", "bits_down"} <= set(rows[0])


def test_a_stop_ends_the_run_with_its_reason_and_a_checkpoint(tmp_path: Path) -> None:
    e = experiment(evaluate=Evaluate(every=1), stop=Stop({"distance": 0.3}))
    _, rows, why = train(e, folder=tmp_path)
    assert len(rows) == 4 and why == "distance 0.25 reached 0.3"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-000004"]


@pytest.mark.parametrize("name", ["virtual_seconds", "own"])
def test_a_run_that_a_stop_ends_is_evaluated_at_its_last_round(name: str) -> None:
    rows = train(experiment(Ticking(), stop=Stop({name: 4})))[1]
    assert [row["round"] for row in rows if "distance" in row] == [3, 4]
    assert rows[-1]["distance"] == pytest.approx(0.25)


def test_patience_ends_a_run_that_no_longer_improves_and_survives_a_resume(tmp_path: Path) -> None:
    """The distance is 1, 0.75, ..., 0 at round 5, and grows again."""
    fields: dict[str, Any] = {
        "evaluate": Evaluate(every=1),
        "stop": Stop(patience=Patience(metric="distance", rounds=3)),
    }
    _, rows, why = train(experiment(rounds=20, **fields))
    assert len(rows) == 8 and why == "distance was best in round 5 (0), 3 rounds ago"
    train(experiment(rounds=7, **fields), sinks=[JsonLines()], folder=tmp_path)
    _, rows, again = train(experiment(rounds=20, **fields), sinks=[JsonLines()], folder=tmp_path, resume=True)
    assert [row["round"] for row in rows] == [8] and again == why
    assert train(experiment(rounds=20, **fields), sinks=[JsonLines()], folder=tmp_path, resume=True)[1:] == ([], why)


class Spoiled(Walk):
    """Walks, and from the second round on its metric is not finite."""

    def round(self, s: State, fleet: Any, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        state, metrics = super().round(s, fleet, rng)
        return state, metrics if state.steps == 1 else {"own": float("nan")}


def test_what_was_not_finite_is_so_again_after_a_resume(tmp_path: Path) -> None:
    made = experiment(Spoiled(), stop=Stop(patience=Patience(metric="own", rounds=2)), allow_divergence=True)
    with Run(made, sinks=[JsonLines()], folder=tmp_path) as run:
        assert [row["round"] for row in run.rounds()] == [1, 2, 3]
    with Run(made, sinks=[JsonLines()], folder=tmp_path, resume=True) as again:
        assert again.ended == run.ended == "own was best in round 1 (1), 2 rounds ago"
        assert list(again.last) == list(run.last) and isnan(again.last["own"])


def test_a_stop_that_no_row_can_reach_is_refused_once_the_model_was_evaluated() -> None:
    with pytest.raises(ConfigError, match=r"^stop.distanse: no row has a number 'distanse'; did you mean 'distance'\?"):
        train(experiment(stop=Stop({"distanse": 0.1})))
    lost = Stop(patience=Patience(metric="test_mae", rounds=3))
    with pytest.raises(
        ConfigError, match=r"^stop.patience.metric: no row has a number 'test_mae'; known: round, .*own"
    ):
        train(experiment(stop=lost))
    assert len(train(experiment(stop=Stop({"own": 2})))[1]) == 2


def test_a_loss_that_explodes_and_stays_finite_is_a_warning_unless_that_was_allowed() -> None:
    wild: dict[str, Any] = {"strategy": Walk(step=7.0), "evaluate": Evaluate(every=1)}
    with pytest.warns(UserWarning, match=r"test_loss rose from .* the run went astray; lower local.optimizer.lr"):
        train(experiment(**wild))
    train(experiment(allow_divergence=True, **wild))


def test_checkpoints_come_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    train(experiment(checkpoint=Checkpoint(every=3)), folder=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["round-000006", "round-000008"]
    train(experiment(checkpoint=Checkpoint(every=None)), folder=tmp_path / "b")
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["round-000008"]


def test_resuming_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    train(experiment(rounds=3), sinks=[JsonLines()], folder=tmp_path)
    again = Walk()
    state, rows, _ = train(experiment(again), sinks=[JsonLines()], folder=tmp_path, resume=True)
    assert [k for k, _ in again.saw] == [3, 4, 5, 6, 7] and rows[0]["round"] == 4 and float(state.x) == 0.0


def test_resuming_with_nothing_saved_starts_at_the_beginning(tmp_path: Path) -> None:
    assert len(train(experiment(rounds=2), sinks=[JsonLines()], folder=tmp_path, resume=True)[1]) == 2


def test_a_checkpoint_of_another_config_is_refused_by_section(tmp_path: Path) -> None:
    first = experiment(rounds=1, config={"seed": 0, "local": {"steps": 1}, "rounds": 1})
    train(first, sinks=[JsonLines()], folder=tmp_path)
    ok = experiment(rounds=1, config={"seed": 0, "local": {"steps": 1}, "rounds": 5, "log": {}})
    train(ok, sinks=[JsonLines()], folder=tmp_path, resume=True)
    for other, named in (
        ({"seed": 1, "local": {"steps": 1}}, r"\(seed differs\)"),
        ({"seed": 0, "local": {"steps": 2}, "task": {}}, r"\(local, task differ\)"),
    ):
        with pytest.raises(ConfigError, match=r"round-000001: belongs to another config " + named):
            train(experiment(rounds=1, config=other), sinks=[JsonLines()], folder=tmp_path, resume=True)


def test_a_choice_of_auto_that_came_out_otherwise_is_named_as_the_key_to_set(tmp_path: Path) -> None:
    there, here = ({"runtime": {"engine": name, "stack": 8}} for name in ("stacked", "compiled"))
    train(experiment(rounds=1, config=there), sinks=[JsonLines()], folder=tmp_path)
    with pytest.raises(ConfigError, match=r"runtime.engine differs.*where `auto` chose: runtime.engine=stacked\)"):
        train(experiment(rounds=1, config=here), sinks=[JsonLines()], folder=tmp_path, resume=True)


def test_of_the_runtime_only_what_fixes_bits_is_compared() -> None:
    runtime = {
        "engine": "stacked",
        "stack": 8,
        "stacks": 2,
        "graphs": True,
        "precision": "fp32",
        "threads": 1,
        "device": "cpu",
        "workers": 2,
    }
    here = fingerprint({"runtime": runtime, "rounds": 9, "versions": {}})
    assert fingerprint({"runtime": {**runtime, "workers": 5, "executor": "ray"}, "rounds": 1}) == here
    for other in ({"stack": 9}, {"stacks": 3}, {"graphs": False}):
        assert fingerprint({"runtime": {**runtime, **other}}) != here


@pytest.mark.parametrize("bad", [inf, nan])
def test_a_model_that_is_not_finite_stops_the_run(bad: float, tmp_path: Path) -> None:
    e = experiment(Walk(then={5: bad}), evaluate=Evaluate(every=100))
    with pytest.raises(
        Diverged, match=r"^round 5: the model not finite, the run diverged; lower local.optimizer.lr or"
    ):
        train(e, sinks=[JsonLines()], folder=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 5
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_may_go_on_after_divergence_if_told_to() -> None:
    assert len(train(experiment(Walk(then={5: nan}), allow_divergence=True))[1]) == 8


def test_a_metric_that_is_not_finite_is_named() -> None:
    with pytest.raises(Diverged, match="^round 3: test_loss, distance, .* not finite"):
        train(experiment(Walk(then={3: inf})))


def test_an_error_of_the_users_server_half_names_strategy_and_round() -> None:
    trouble = KeyError("mine")
    with pytest.raises(ServerError, match=r"^Walk.round failed in round 4: KeyError: 'mine'$") as found:
        train(experiment(Walk(then={4: trouble})))
    assert found.value.__cause__ is trouble


def test_settings_that_a_strategy_of_ours_refuses_are_a_mistake_of_the_file() -> None:
    class Ours(Walk):
        __module__ = "fedsim.strategies.walk"

    with pytest.raises(ConfigError, match="^round 2: Ours: f=3 is too large$"):
        train(experiment(Ours(then={2: ValueError("f=3 is too large")})))


def test_a_state_without_a_model_is_refused() -> None:
    class Modelless(Walk):
        def init(self, x0: Tensor) -> Any:
            return None

    with pytest.raises(ConfigError, match=r"Modelless.init returned a NoneType; return a dataclass whose field x"):
        train(experiment(Modelless()))


def press(*signals: int, at: int) -> Any:
    def watch(row: Any) -> None:
        if row["round"] == at:
            for number in signals:
                os.kill(os.getpid(), number)

    return watch


@pytest.mark.parametrize(
    ("signals", "code"),
    [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGTERM, signal.SIGTERM], 143)],
)
def test_a_signal_ends_the_round_and_saves(signals: list[int], code: int, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="stopped after round 2") as stopped:
        train(experiment(), folder=tmp_path, watch=press(*signals, at=2))
    assert stopped.value.exit_code == code
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-000002"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_stops_at_once(first: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(experiment(), folder=tmp_path, watch=press(first, signal.SIGINT, at=2))
    assert not (tmp_path / "checkpoints").exists()


def test_runs_in_turns_leave_ctrl_c_as_it_was() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever run another test has left unfinished
    asked = list[int]()
    first, second = interruptible([]), interruptible(asked)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    signal.raise_signal(signal.SIGINT)
    assert asked == [signal.SIGINT]
    second.__exit__(None, None, None)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Evaluate(every=0), "every must be at least 1 round, got 0"),
        (lambda: Checkpoint(every=0), "every must be at least 1 round or null, got 0"),
    ],
)
def test_intervals_are_at_least_a_round(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
