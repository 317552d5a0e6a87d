import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import fedsim
from fedsim.compose.entries import KINDS
from fedsim.compose.sections import Log
from fedsim.config import ConfigError, decode
from fedsim.history import History
from fedsim.observers import ObserverError
from fedsim.sinks import (
    SINKS,
    JsonLines,
    MLflow,
    TensorBoard,
    Trackio,
    WandB,
    encode_row,
    json_lines_first,
    read_rows,
    rows_in_order,
    scalars,
)

CONFIG = {"seed": 0, "strategy": {"name": "fedavg", "server_lr": 1.0}}


def write(sink, run_dir, rounds, resume_at=None):
    sink.open(run_dir, CONFIG, resume_at)
    for r in rounds:
        sink.write({"round": r, "train_loss": 1 / r})
    sink.close()
    sink.close()


def test_every_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    sink = JsonLines()
    sink.open(tmp_path, CONFIG, None)
    sink.write({"round": 1, "train_loss": 0.1})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"round": 1, "train_loss": 0.1}]
    sink.close()


def test_floats_come_back_to_the_last_bit(tmp_path):
    value = 0.1 + 0.2
    assert json.loads(encode_row({"round": 1, "v": np.float64(value)}))["v"] == value


def test_numpy_and_torch_values_are_written_as_plain_ones():
    row = {"round": np.int64(3), "loss": torch.tensor(0.5), "x": torch.tensor([1.0, 2.0]), "flag": np.bool_(True)}
    assert encode_row(row) == '{"round": 3, "loss": 0.5, "x": [1.0, 2.0], "flag": true}'


def test_nonfinite_numbers_are_null_and_named(tmp_path):
    row = {"round": 1, "loss": math.inf, "x": [1.0, math.nan], "ok": 2.0}
    line = encode_row(row)
    assert json.loads(line) == {"round": 1, "loss": None, "x": [1.0, None], "ok": 2.0, "nonfinite": ["loss", "x"]}
    assert encode_row(json.loads(line)) == line
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    back = History.load(tmp_path).rows[0]
    assert math.isnan(back["loss"]) and math.isnan(back["x"][1]) and "nonfinite" not in back


def test_resume_cuts_the_rows_beyond_the_checkpoint_and_goes_on(tmp_path):
    write(JsonLines(), tmp_path, range(1, 8))
    write(JsonLines(), tmp_path, range(5, 10), resume_at=4)
    assert [row["round"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_file_equals_one_that_was_never_stopped(tmp_path):
    for name in ("stopped", "whole"):
        (tmp_path / name).mkdir()
    write(JsonLines(), tmp_path / "stopped", range(1, 8))
    write(JsonLines(), tmp_path / "stopped", range(5, 10), resume_at=4)
    write(JsonLines(), tmp_path / "whole", range(1, 10))
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("torn", ['{"round": 3, "trai', "nul", '{"round"'])
def test_a_line_cut_short_by_a_crash_is_forgotten(tmp_path, torn):
    write(JsonLines(), tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(torn)
    assert [row["round"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    write(JsonLines(), tmp_path, [3], resume_at=2)
    assert [row["round"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("broken", ["{oops", "[1]", '{"train_loss": 1}', '{"round": null}', ""])
def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n' + broken + '\n{"round": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 "):
        read_rows(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl lacks row 2"):
        JsonLines().open(tmp_path, CONFIG, 3)
    assert "round" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (['{"round": 1}', '{"round": 2}'], 2),
        (['{"round": 1}', '{"round": 2}', '{"rou'], 2),
        (['{"round": 1}', '{"round": 3}'], 1),
        (['{"round": 1}', '{"round": 1}', '{"round": 2}'], 1),
        (['{"round": 2}'], 0),
        ([], 0),
    ],
)
def test_rows_count_up_to_the_first_that_is_missing_or_doubled(tmp_path, lines, count):
    file = tmp_path / "metrics.jsonl"
    assert rows_in_order(file) == []
    file.write_text("\n".join(lines))
    assert [row["round"] for row in rows_in_order(file)] == list(range(1, count + 1))


def test_a_new_run_never_writes_over_an_old_one(tmp_path):
    write(JsonLines(), tmp_path, [1])
    with pytest.raises(ValueError, match="already holds a run"):
        JsonLines().open(tmp_path, CONFIG, None)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_resume_at_zero_starts_with_an_empty_file(tmp_path):
    write(JsonLines(), tmp_path, [1, 2])
    write(JsonLines(), tmp_path, [1], resume_at=0)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_viewers_are_shown_finite_numbers_only():
    row = {"round": 1, "a": torch.tensor(2.0), "b": math.nan, "x": [1.0], "c": True, "d": None, "e": 3}
    assert scalars(row) == {"a": 2.0, "e": 3.0}


def test_tensorboard_reads_back_what_was_written_and_hides_what_a_resume_redoes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(TensorBoard(), tmp_path, [1, 2, 3, 4])
    write(TensorBoard(), tmp_path, [3, 4, 5], resume_at=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = events.Scalars("train_loss")
    assert [e.step for e in read] == [1, 2, 3, 4, 5]
    assert [e.value for e in read] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert events.Tags()["tensors"] == ["config/text_summary"]


class FakeRun:
    def __init__(self, kwargs):
        self.kwargs, self.logged, self.finished = kwargs, [], 0

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def fake_init(monkeypatch, name):
    module, runs = ModuleType(name), []
    module.init = lambda **kwargs: runs.append(FakeRun(kwargs)) or runs[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return runs


def test_wandb_is_offline_unless_told_and_resumes_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    runs = fake_init(monkeypatch, "wandb")
    write(WandB(), tmp_path, [1, 2])
    write(WandB(), tmp_path, [2, 3], resume_at=1)
    first, second = runs
    assert (
        first.kwargs["mode"] == "offline" and first.kwargs["project"] == "fedsim" and first.kwargs["config"] == CONFIG
    )
    assert first.kwargs["id"] == second.kwargs["id"]
    assert first.logged == [(1, {"train_loss": 1.0}), (2, {"train_loss": 0.5})]
    assert first.finished == 1
    monkeypatch.setenv("WANDB_MODE", "online")
    write(WandB(), tmp_path, [1])
    assert runs[2].kwargs["mode"] == "online"
    assert runs[2].kwargs["id"] != first.kwargs["id"]


def test_trackio_resumes_the_run_of_the_same_name(tmp_path, monkeypatch):
    runs = fake_init(monkeypatch, "trackio")
    write(Trackio(), tmp_path, [1])
    write(Trackio(), tmp_path, [2], resume_at=1)
    assert [r.kwargs["resume"] for r in runs] == ["never", "allow"]
    assert runs[0].kwargs["name"] == runs[1].kwargs["name"]
    assert runs[0].kwargs["name"].startswith(Path(tmp_path).name)
    assert runs[1].logged == [(2, {"train_loss": 0.5})] and runs[1].finished == 1


def test_mlflow_gets_parameters_once_and_metrics_by_step(tmp_path, monkeypatch):
    class Client:
        def __init__(self):
            self.params, self.metrics, self.ended = {}, [], []
            clients.append(self)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "e-" + name

        def create_run(self, experiment_id, tags, run_name):
            self.tags = tags
            return SimpleNamespace(info=SimpleNamespace(run_id=f"{experiment_id}/{run_name}"))

        def log_param(self, run_id, key, value):
            self.params[key] = value

        def log_batch(self, run_id, metrics):
            self.metrics += [(run_id, m[0], m[1], m[3]) for m in metrics]

        def set_terminated(self, run_id):
            self.ended.append(run_id)

    clients: list[Client] = []
    entities = ModuleType("mlflow.entities")
    entities.Metric = lambda *args: args  # type: ignore[attr-defined]
    mlflow = ModuleType("mlflow")
    mlflow.MlflowClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    write(MLflow(), tmp_path, [1])
    write(MLflow(), tmp_path, [2], resume_at=1)
    run_id = f"e-fedsim/{tmp_path.name}"
    assert clients[0].params == {"seed": "0", "strategy.name": "fedavg", "strategy.server_lr": "1.0"}
    assert clients[1].params == {}
    assert clients[0].metrics + clients[1].metrics == [(run_id, "train_loss", 1.0, 1), (run_id, "train_loss", 0.5, 2)]
    assert clients[1].ended == [run_id]
    (tmp_path / "other").mkdir()
    write(MLflow(experiment="mine", name="best", tags={"who": "me"}), tmp_path / "other", [1])
    assert clients[2].ended == ["e-mine/best"] and clients[2].tags == {"who": "me"}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_sink_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"pip install 'fedsim-stacks\[{name}\]'"):
        SINKS[name]().open(tmp_path, CONFIG, None)


def sinks(*entries):
    """As a file names them."""
    return json_lines_first(decode(Log, {"sinks": list(entries)}, "log", KINDS)().sinks)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_sink_that_is_not_installed_is_refused_before_there_is_a_folder(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=rf"^log.sinks\[1\]: '{name}' is not installed; run pip install 'fedsim-stacks\[{name}\]', or"
    ):
        sinks("jsonl", name)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert [type(s) for s in sinks("jsonl", name)] == [JsonLines, SINKS[name]]


def test_json_lines_are_always_first_and_an_unknown_name_gets_a_hint():
    assert [type(s) for s in sinks("tensorboard")] == [JsonLines, TensorBoard]
    with pytest.raises(
        ConfigError, match=r"log.sinks\[0\].name: unknown name 'tensorbord'; did you mean 'tensorboard'"
    ):
        sinks("tensorbord")
    with pytest.raises(ConfigError, match="known: jsonl, "):
        sinks("qqq")
    with pytest.raises(ConfigError, match=r"^log.sinks\[2\]: tensorboard stands there twice"):
        sinks("tensorboard", "jsonl", {"name": "tensorboard"})
    with pytest.raises(ConfigError, match=r"^log.sinks: expected a list such as"):
        decode(Log, {"sinks": "tensorboard"}, "log", KINDS)


def test_settings_of_a_sink_reach_its_package(tmp_path, monkeypatch):
    runs = fake_init(monkeypatch, "wandb")
    entry = {"name": "wandb", "project": "x", "entity": "lab", "group": "y", "tags": ["a", "b"], "mode": "online"}
    write(sinks(entry)[1], tmp_path, [1])
    kwargs = runs[0].kwargs
    assert {k: kwargs[k] for k in ("project", "entity", "group", "tags", "mode")} == {
        k: v for k, v in entry.items() if k != "name"
    }
    trackio = fake_init(monkeypatch, "trackio")
    write(sinks({"name": "trackio", "project": "z"})[1], tmp_path, [1])
    assert trackio[0].kwargs["project"] == "z"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "wandb", "projekt": "x"}, r"^log.sinks\[0\].projekt: unknown key; did you mean 'project'\?"),
        ({"name": "wandb", "tags": "a"}, r"^log.sinks\[0\].tags: expected a list of text"),
        ({"name": "jsonl", "file": "x"}, r"^log.sinks\[0\].file: unknown key"),
    ],
)
def test_unknown_settings_of_a_sink_are_refused(monkeypatch, entry, message):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    with pytest.raises(ConfigError, match=message):
        sinks(entry)


class Kept:
    """A sink of the user's own."""

    def __init__(self, file: str = "kept.txt", trouble: str | None = None) -> None:
        self.file, self.trouble = file, trouble

    def open(self, run_dir, config, resume_at):
        self.path = run_dir / self.file
        self.path.write_text(f"seed {config['seed']}\n")

    def write(self, row):
        if self.trouble:
            raise ValueError(self.trouble)
        self.path.write_text(self.path.read_text() + f"{row['round']}\n")

    def close(self):
        self.path.write_text(self.path.read_text() + "closed\n")


CLEAN = {"task": {"name": "quadratic", "dim": 2}, "clients": {"count": 3}, "rounds": 2, "runtime": {"workers": 1}}


def test_a_sink_of_ones_own_gets_the_rows_and_its_settings(tmp_path):
    entry = {"name": f"{__name__}:Kept", "file": "mine.txt"}
    history = fedsim.run({**CLEAN, "log": {"sinks": [entry]}}, out=tmp_path / "run")
    assert (tmp_path / "run" / "mine.txt").read_text() == "seed 0\n1\n2\nclosed\n"
    assert history.config["log"]["sinks"] == [{**entry, "trouble": None}]


def test_an_error_in_a_sink_of_ones_own_is_named_with_its_place(tmp_path):
    entry = {"name": f"{__name__}:Kept", "trouble": "no room"}
    message = r"^sink Kept failed in round 1: ValueError: no room \(test_sinks.py, line \d+\)$"
    with pytest.raises(ObserverError, match=message):
        fedsim.run({**CLEAN, "log": {"sinks": [entry]}}, out=tmp_path / "run")


def no_sink():
    return 3


def test_what_is_no_sink_is_refused():
    with pytest.raises(ConfigError, match="no_sink gave a int, not a sink; it needs methods open, write and close"):
        sinks(f"{__name__}:no_sink")
    with pytest.raises(ConfigError, match=r"^log.sinks\[0\]: <class 'dict'> does not say what parameters it takes"):
        sinks("builtins:dict")
