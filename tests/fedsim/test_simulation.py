"""Runs from Python: stepped through by hand, watched by callbacks, and kept where they are best."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fedsim
from fedsim import checkpoint
from fedsim.best import Best
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.history import BEST_FILE
from fedsim.loop import Interrupted
from fedsim.observers import ObserverError
from fedsim.results import write_config
from fedsim.sim.place import Place
from tests.build import rows_in, without_wall_time

CONFIG: dict[str, Any] = {
    "rounds": 6,
    "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [8], "dropout": 0.2}},
    "partition": {"name": "dirichlet", "alpha": 0.3},
    "clients": {"count": 12},
    "strategy": {"name": "fedavg", "cohort_size": 4},
    "local": {"batch_size": 50, "optimizer": {"name": "sgd", "lr": 0.1}},
    "evaluate": {"every": 2, "per_client": False},
    "checkpoint": {"every": 2},
    "runtime": {"workers": 1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    fedsim.run(CONFIG, out=folder)
    return folder


def model(folder: Path, name: str = "model") -> bytes:
    return (folder / f"{name}.safetensors").read_bytes()


def same_run(folder: Path, whole: Path) -> bool:
    return rows_in(folder) == rows_in(whole) and model(folder) == model(whole)


# By hand ----------------------------------------------------------------------------------------------------------


def test_a_file_a_mapping_and_steps_by_hand_give_the_same_bits(whole: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "file.yaml", CONFIG)
    fedsim.run(tmp_path / "file.yaml", out=tmp_path / "file")
    assert same_run(tmp_path / "file", whole)
    with fedsim.simulate(CONFIG, out=tmp_path / "hand") as simulation:
        seen = [simulation.step(), simulation.step()]
        torch.randn(3)  # what one does in between is one's own
        seen += simulation.rounds()
    assert same_run(tmp_path / "hand", whole) and without_wall_time(seen) == rows_in(whole)
    assert (tmp_path / "hand" / "report.html").exists()
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, tmp_path / "hand")]
    assert summaries[0]["ended"] == summaries[1]["ended"] == "all 6 rounds done"


def test_a_simulation_shows_state_model_and_metrics_as_they_stand() -> None:
    with fedsim.simulate(CONFIG) as simulation:
        assert simulation.round == 0 and not simulation.metrics and simulation.ended is None
        before = simulation.state.x.clone()
        for metrics in simulation.rounds():
            assert simulation.round == metrics["round"] and simulation.metrics == metrics
            tensors = dict(simulation.model.named_parameters())
            x = torch.cat([t.detach().flatten() for t in tensors.values()])
            assert torch.equal(x, simulation.state.x) and not torch.equal(x, before)
            assert not simulation.model.training
            with torch.no_grad():
                simulation.model[1].weight.zero_()  # a copy: the run does not see it
        assert simulation.ended == "all 6 rounds done"
        with pytest.raises(ValueError, match="^round 7: the run has ended, all 6 rounds done$"):
            simulation.step()
    assert len(simulation.history) == 6 and simulation.history.path is None


def test_the_model_says_what_the_run_measured() -> None:
    history = fedsim.run(CONFIG)
    made = compose(CONFIG, "x")
    made.close()
    assert made.samples is not None
    with torch.no_grad():
        guessed = history.model(made.samples.data.test_inputs).argmax(1)
    assert float((guessed == made.samples.data.test_targets).double().mean()) == pytest.approx(
        history.last("test_accuracy")
    )


def test_a_run_left_early_is_complete_and_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with fedsim.simulate(CONFIG, out=folder) as simulation:
        for metrics in simulation.rounds():
            if metrics["round"] == 3:
                break
    assert json.loads((folder / "summary.json").read_text())["ended"] == "left before its end"
    assert len(rows_in(folder)) == 3 and (folder / "report.html").exists()
    fedsim.run(CONFIG, out=folder, resume=True)
    assert same_run(folder, whole)


def test_save_makes_a_checkpoint_at_any_round(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), fedsim.simulate(CONFIG, out=folder) as simulation:
        simulation.step()
        simulation.save()
        raise ZeroDivisionError
    assert [p.name for p in checkpoint.checkpoints(folder / "checkpoints")] == ["round-000001"]
    assert not (folder / "summary.json").exists(), "an error leaves the folder as it is"
    with fedsim.simulate(CONFIG, out=folder, resume=True) as simulation:
        assert simulation.round == 1
        assert len(list(simulation.rounds())) == 5
    assert same_run(folder, whole)


def test_a_round_that_broke_off_is_not_saved_whoever_catches_its_error(whole: Path, tmp_path: Path) -> None:
    def fail(simulation: fedsim.Simulation) -> None:
        if simulation.round == 3:
            raise KeyError("mine")

    folder = tmp_path / "run"
    with fedsim.simulate(CONFIG, out=folder, callbacks=[fail]) as simulation:
        with pytest.raises(ObserverError):
            list(simulation.rounds())
        assert simulation.ended == "round 3 broke off" and not list(simulation.rounds())
        with pytest.raises(ValueError, match="round 3 broke off, so there is nothing whole to save"):
            simulation.save()
    assert [p.name for p in checkpoint.checkpoints(folder / "checkpoints")] == ["round-000002"]
    assert not (folder / "summary.json").exists()
    fedsim.run(CONFIG, out=folder, resume=True)
    assert same_run(folder, whole)


def test_a_simulation_keeps_its_folder_to_itself_until_it_is_closed(tmp_path: Path) -> None:
    simulation = fedsim.simulate(CONFIG, out=tmp_path / "run")
    simulation.step()
    with pytest.raises(ConfigError, match="already"):
        fedsim.simulate(CONFIG, out=tmp_path / "run")
    simulation.close()
    simulation.close()
    assert simulation.round == 1 and len(simulation.history) == 1
    fedsim.simulate(CONFIG, out=tmp_path / "run", resume=True).close()


def test_ctrl_c_while_stepping_ends_with_a_checkpoint(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after round 1"):
        with fedsim.simulate(CONFIG, out=tmp_path / "run") as simulation:
            for _ in simulation.rounds():
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == ["round-000001"]


def test_ctrl_c_is_not_lost_where_the_loop_is_left_in_the_same_round(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped after round 2"):
        with fedsim.simulate(CONFIG, out=tmp_path / "run") as simulation:
            for metrics in simulation.rounds():
                if metrics["round"] == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                    break
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"] == "left before its end"
    simulation.close()


def test_under_torchrun_no_rank_steps_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with fedsim.simulate(CONFIG) as simulation:
        monkeypatch.setattr("fedsim.runs.place", lambda: Place(0, 0, 2, 2, "localhost"))
        with pytest.raises(ConfigError, match="under torchrun .* call rounds"):
            simulation.step()


# Callbacks --------------------------------------------------------------------------------------------------------


def test_callbacks_see_every_round_and_leave_the_bits_alone(whole: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def watch(simulation: fedsim.Simulation) -> None:
        torch.manual_seed(0)
        made = simulation.model.train()
        made(torch.randn(5, 1, 8, 8)).sum().backward()
        seen.append((simulation.metrics["round"], float(simulation.state.x.norm())))

    fedsim.run(CONFIG, out=tmp_path / "run", callbacks=[watch])
    assert same_run(tmp_path / "run", whole) and [k for k, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert len({norm for _, norm in seen}) == 6


class At:
    """A callback that is an object: stops at a round."""

    def __init__(self, round: int, says: Any = "far enough") -> None:
        self.round, self.says = round, says

    def __call__(self, simulation: fedsim.Simulation) -> Any:
        return self.says if simulation.round == self.round else None


def test_a_callback_ends_the_run_and_its_last_round_is_evaluated(whole: Path, tmp_path: Path) -> None:
    history = fedsim.run(CONFIG, out=tmp_path / "run", callbacks=[At(3)])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"] == "far enough"
    assert [row["round"] for row in history.rows if "test_accuracy" in row] == [2, 3]
    fedsim.run(CONFIG, out=tmp_path / "run", resume=True)  # without the callback it goes on
    rows = rows_in(tmp_path / "run")
    assert rows[:2] + rows[3:] == rows_in(whole)[:2] + rows_in(whole)[3:] and model(tmp_path / "run") == model(whole)


@pytest.mark.parametrize("says", [True, 3, ["why"]])
def test_a_callback_says_why_as_text(says: Any) -> None:
    message = r"^callback At failed in round 1: TypeError: it returned .*; return None, or why the run is to end, as"
    with pytest.raises(ObserverError, match=message):
        fedsim.run(CONFIG, callbacks=[At(1, says)])


def test_an_error_in_a_callback_is_named_with_its_place() -> None:
    def look(simulation: fedsim.Simulation) -> None:
        simulation.metrics["nothing"]

    with pytest.raises(
        ObserverError, match=r"look failed in round 1: KeyError: 'nothing' \(test_simulation.py, line \d+"
    ) as e:
        fedsim.run(CONFIG, callbacks=[look])
    assert isinstance(e.value.__cause__, KeyError)


def test_a_checkpoint_that_a_callback_asks_for_holds_the_whole_round(whole: Path, tmp_path: Path) -> None:
    def save(simulation: fedsim.Simulation) -> str | None:
        simulation.save()
        return None

    changes = {"checkpoint.every": None, "checkpoint.best": "test_loss"}
    with pytest.raises(Interrupted):
        fedsim.run(CONFIG, out=tmp_path / "run", callbacks=[save, press_at(3)], **changes)
    found = checkpoint.load(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-2])
    assert found.take("round") == 2 and found.take("best", {"Best": Best}).round == 2


def test_a_complete_run_that_goes_on_is_not_called_complete_until_it_is(tmp_path: Path) -> None:
    summary = tmp_path / "run" / "summary.json"
    fedsim.run(CONFIG, out=tmp_path / "run", rounds=2)
    with pytest.raises(Interrupted):
        fedsim.run(CONFIG, out=tmp_path / "run", resume=True, callbacks=[press_at(3)])
    assert not summary.exists()
    fedsim.run(CONFIG, out=tmp_path / "run", resume=True)
    assert json.loads(summary.read_text())["rounds"] == 6


def test_a_checkpoint_that_a_callback_asks_for_costs_no_other_if_the_round_breaks_off(tmp_path: Path) -> None:
    def save_and_fail(simulation: fedsim.Simulation) -> None:
        simulation.save()
        if simulation.round == 3:
            raise KeyError("mine")

    folder, changes = tmp_path / "run", {"checkpoint.keep": 1, "checkpoint.every": None}
    with pytest.raises(ObserverError):
        fedsim.run(CONFIG, out=folder, callbacks=[save_and_fail], **changes)
    assert [p.name for p in checkpoint.checkpoints(folder / "checkpoints")] == ["round-000002"]
    with fedsim.simulate(CONFIG, out=folder, resume=True, **changes) as simulation:
        assert simulation.round == 2


def press_at(round: int) -> Callable[[fedsim.Simulation], None]:
    def press(simulation: fedsim.Simulation) -> None:
        if simulation.round == round:
            os.kill(os.getpid(), signal.SIGINT)

    return press


# What is kept -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    x: Tensor


@dataclass(frozen=True)
class Walk(fedsim.Strategy):
    """Moves the model by a fixed step each round."""

    step: float = -0.25

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: fedsim.Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        return State(s.x + self.step), {}


PAST: dict[str, Any] = {
    "rounds": 8,
    "task": {"name": "quadratic", "a": [1, 3], "b": [0, 1], "x0": 2},  # solved by 0.75, five steps away
    "evaluate": {"every": 1},
    "checkpoint": {"every": 4, "best": "distance"},
    "runtime": {"workers": 1},
}


def best_in(folder: Path) -> float:
    return float(load_file(folder / "model.best.safetensors")["x"])


def test_the_best_model_is_kept_while_the_run_goes_on(tmp_path: Path) -> None:
    history = fedsim.run(PAST, strategy=Walk(), out=tmp_path / "run")
    assert history.best["round"] == 5 and history.best["distance"] == 0.0
    assert best_in(tmp_path / "run") == 0.75 and float(load_file(tmp_path / "run" / "model.safetensors")["x"]) == 0.0
    assert not (
        fedsim.run(PAST, strategy=Walk(), out=tmp_path / "b", **{"checkpoint.best": None}).path / BEST_FILE
    ).exists()


def test_the_best_model_outlives_a_kill_and_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), fedsim.simulate(PAST, strategy=Walk(), out=folder) as simulation:
        for metrics in simulation.rounds():
            assert best_in(folder) == max(0.75, 2 - 0.25 * metrics["round"])
            if metrics["round"] == 6:
                raise ZeroDivisionError  # as if it had been killed: the newest checkpoint is that of round 4
    with fedsim.simulate(PAST, strategy=Walk(), out=folder, resume=True) as simulation:
        assert simulation.round == 4 and best_in(folder) == 1.0, "what was given up is no model of this run"
        simulation.step()
        assert best_in(folder) == 0.75
    with fedsim.simulate(PAST, strategy=Walk(), out=folder, resume=True) as simulation:
        simulation.step()
        assert best_in(folder) == 0.75 and simulation.history.best["round"] == 5


@dataclass(frozen=True)
class Telling(Walk):
    """Says in every row how far it is from 0.75 and from 2."""

    def round(self, s: State, fleet: fedsim.Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        x = s.x + self.step
        return State(x), {"own_error": abs(float(x) - 0.75), "walked": abs(float(x) - 2)}


def test_the_best_row_and_the_best_model_are_of_one_round_where_every_row_has_the_metric(tmp_path: Path) -> None:
    changes = {"evaluate.every": 4, "checkpoint.best": "own_error"}
    history = fedsim.run(PAST, strategy=Telling(), out=tmp_path / "run", **changes)
    assert history.best["round"] == 5 and best_in(tmp_path / "run") == 0.75


def test_a_metric_named_by_a_resume_counts_the_rows_before(tmp_path: Path) -> None:
    folder, own = tmp_path / "run", {"strategy": Telling(), "out": tmp_path / "run"}
    fedsim.run(PAST, rounds=6, **own, **{"checkpoint.best": None})  # best in round 5, one before the last
    more = fedsim.run(PAST, rounds=7, resume=True, **own)
    assert more.best["round"] == 5 and not (folder / BEST_FILE).exists()
    with pytest.raises(ValueError, match="the model of round 5 was not kept: checkpoint.best was named later"):
        more.best_model  # noqa: B018
    fedsim.run(PAST, rounds=8, resume=True, **own, **{"checkpoint.best": "walked"})  # the later, the better
    assert best_in(folder) == 0.0


def test_a_metric_that_no_round_has_is_refused_at_the_first_evaluation() -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint.best: .* no number 'distanse'; did you mean 'distance'\?"):
        fedsim.run(PAST, strategy=Walk(), **{"checkpoint.best": "distanse"})


def test_models_come_back_from_a_folder(tmp_path: Path) -> None:
    best = {"checkpoint.best": "test_accuracy", "evaluate.every": 1, "local.optimizer.lr": 0.3}
    here = fedsim.run(CONFIG, out=tmp_path / "run", **best)
    there = fedsim.History.load(tmp_path / "run")
    accuracy = here.series("test_accuracy")[1]
    assert here.best["test_accuracy"] == max(accuracy) and there.best["round"] == here.best["round"]
    for name in ("model", "best_model"):
        first, second = getattr(here, name), getattr(there, name)
        assert not first.training and not second.training
        assert all(torch.equal(first.state_dict()[k], v) for k, v in second.state_dict().items())
    made = compose(CONFIG, "x")
    made.close()
    assert made.samples is not None
    with torch.no_grad():
        guessed = there.best_model(made.samples.data.test_inputs).argmax(1)
    assert float((guessed == made.samples.data.test_targets).double().mean()) == pytest.approx(max(accuracy))


def test_what_has_no_model_says_so(tmp_path: Path) -> None:
    history = fedsim.run(PAST, strategy=Walk(), out=tmp_path / "run")
    with pytest.raises(ValueError, match="model.safetensors: its task has no module; safetensors.torch.load_file"):
        history.model  # noqa: B018
    with pytest.raises(ValueError, match="no module; simulation.state.x holds"), fedsim.simulate(PAST) as simulation:
        simulation.model  # noqa: B018
    with pytest.raises(ValueError, match="the best model was not kept; name a metric by checkpoint.best"):
        fedsim.History([]).best_model  # noqa: B018
    with pytest.raises(ValueError, match="no row has test_accuracy or distance or test_loss; there are no rows"):
        fedsim.History([]).best  # noqa: B018


@pytest.mark.parametrize(("keep", "left"), [(1, [8]), (3, [4, 6, 8]), (None, [2, 4, 6, 8])])
def test_so_many_checkpoints_are_kept(keep: int | None, left: list[int], tmp_path: Path) -> None:
    fedsim.run(PAST, strategy=Walk(), out=tmp_path / "run", **{"checkpoint.every": 2, "checkpoint.keep": keep})
    names = [p.name for p in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == [f"round-{k:06d}" for k in left]


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint: keep must be at least 1 checkpoint or null, got 0"):
        fedsim.run(PAST, **{"checkpoint.keep": 0})


def test_a_run_leaves_nothing_behind_in_its_process() -> None:
    def left_by_a_run() -> int:
        fedsim.run({**CONFIG, "rounds": 1, "local": {**CONFIG["local"], "steps": 1}})
        gc.collect()
        return len(gc.get_objects())

    for _ in range(2):
        left_by_a_run()  # what a process keeps once
    gc.freeze()  # uncounted from here on, so that nothing which other tests left can make up for a leak by going
    try:
        counts = [left_by_a_run() for _ in range(3)]
    finally:
        gc.unfreeze()
    assert counts[2] <= counts[1], counts
