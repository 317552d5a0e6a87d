"""Run folders: what a run leaves, and that stopping, resuming and the number of workers leave no trace in it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedsim
from fedsim import checkpoint, results, runs
from fedsim.config import ConfigError
from fedsim.loop import Interrupted
from fedsim.sinks import JsonLines
from tests.build import rows_in, without_wall_time
from tests.fedsim.console import contents
from tests.fedsim.console import fedsim as console

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHORT = {"rounds": 6, "evaluate.every": 2, "checkpoint.every": 3, "log.sinks": ["jsonl"]}

QUADRATIC: dict[str, Any] = {
    "rounds": 20,
    "task": {"name": "quadratic", "dim": 6, "noise": 0.1},
    "clients": {"count": 12, "devices": {"name": "lognormal", "median": 0.1, "sigma": 1.0}},
    "strategy": {"name": "fedavg", "cohort_size": 5},
    "local": {"steps": 3, "optimizer": {"name": "sgd", "lr": 0.1}},
    "evaluate": {"every": 4},
    "checkpoint": {"every": 6},
}


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def interrupt_at(*rounds: int) -> Callable[[Mapping[str, Any]], None]:
    """A watcher that presses Ctrl-C after some rounds."""

    def watch(row: Mapping[str, Any]) -> None:
        if row["round"] in rounds:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


def run_interrupted(config: Mapping[str, Any], folder: Path, *rounds: int) -> None:
    """A run that is stopped after each of these rounds and resumed every time."""
    for k in (*rounds, None):
        raw, source = runs.load(config, {})
        resume = (folder / "metrics.jsonl").exists()
        if k is None:
            runs.execute(raw, source, folder, resume=resume)
        else:
            with pytest.raises(Interrupted, match=f"stopped after round {k}$"):
                runs.execute(raw, source, folder, resume=resume, watch=interrupt_at(k))


# What a folder holds ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rounds of the quickstart."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    fedsim.run(QUICKSTART, out=folder, **SHORT)
    return folder


def test_a_folder_holds_everything_that_a_run_leaves(short: Path) -> None:
    files = contents(short)
    expected = {"config.yaml", "env.json", "metrics.jsonl", "summary.json", "model.safetensors", "clients.jsonl"}
    assert expected | {"split.npz", "report.html"} <= set(files)
    assert [p.name for p in checkpoint.checkpoints(short / "checkpoints")] == ["round-000003", "round-000006"]
    assert not [name for name in files if ".part" in name]


def test_the_files_of_a_folder_agree(short: Path) -> None:
    history = fedsim.History.load(short)
    summary = json.loads((short / "summary.json").read_text())
    assert summary["rounds"] == len(history) == 6 and summary["ended"] == "all 6 rounds done"
    assert summary["final"]["test_accuracy"] == history.last("test_accuracy")
    accuracies = history.series("test_accuracy")
    assert accuracies[0].tolist() == [2, 4, 6] and summary["best_test_accuracy"] == max(accuracies[1])
    clients = [json.loads(line) for line in (short / "clients.jsonl").read_text().splitlines()]
    assert sum(c["num_examples"] for c in clients) == 1438 and len(clients) == 96  # four clients have no samples
    mean = sum(c["accuracy"] for c in clients) / len(clients)
    assert mean == pytest.approx(history.last("client_accuracy_mean"), abs=1e-12)
    state = load_file(short / "model.safetensors")
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "1.weight": (200, 64),
        "1.bias": (200,),
        "3.weight": (10, 200),
        "3.bias": (10,),
    }
    env = json.loads((short / "env.json").read_text())
    assert env["torch"] == torch.__version__ and env["device"] == "cpu" and env["fedsim"]


def test_the_resolved_config_gives_the_same_metrics_again(short: Path, tmp_path: Path) -> None:
    again = fedsim.run(short / "config.yaml", out=tmp_path / "again")
    assert rows_in(tmp_path / "again") == rows_in(short) and model(tmp_path / "again") == model(short)
    chosen = again.config["runtime"]
    assert (
        isinstance(chosen["stack"], int)
        and chosen["engine"] == "stacked"
        and isinstance(chosen["native"], bool)
        and chosen["device"] == "cpu"
    )
    first, second = ((f / "config.yaml").read_text() for f in (short, tmp_path / "again"))
    assert first == second


def test_a_run_without_a_folder_gives_the_same_history_and_writes_nothing(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    history = fedsim.run(QUICKSTART, **SHORT)
    assert without_wall_time(history.rows) == rows_in(short)
    assert not list(tmp_path.iterdir()) and history.path is None


def test_a_configuration_may_be_given_as_mappings() -> None:
    history = fedsim.run(QUADRATIC, rounds=2, **{"local.optimizer.lr": 0.2})
    assert len(history) == 2 and history.config["local"]["optimizer"]["lr"] == 0.2
    assert QUADRATIC["rounds"] == 20 and QUADRATIC["local"]["optimizer"]["lr"] == 0.1


def test_resume_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="resume=True needs out="):
        fedsim.run(QUADRATIC, resume=True)


# Stop and resume --------------------------------------------------------------------------------------------------

POWER = {"name": "powersgd", "rank": 1}
DIGITS = {"task": {"name": "classification", "dataset": "digits", "model": "logistic"}}
KINDS: dict[str, dict[str, Any]] = {  # beside strategies and links, of which tests/contracts/test_strategies.py has all
    "fedfix": {"strategy": {"name": "fedfix", "interval": 0.25}},
    "clients keep optimizer state": {
        "local": {"steps": 3, "optimizer": {"name": "adam", "lr": 0.01, "state_scope": "client"}}
    },
    "a packet begins with the last one": {
        **DIGITS,
        "uplink": {"compressor": POWER, "error_feedback": True},
        "downlink": {"compressor": POWER},
    },
    "the server's, too": {
        **DIGITS,
        "local": {"optimizer": {"name": "sgd", "lr": 0.1}},
        "strategy": {"name": "ef21_bc", "compressor": POWER, "server_compressor": POWER},
    },
    "clients lie": {"clients": {"count": 12, "byzantine": {"attack": {"name": "alie"}, "count": 3}}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_twice_equals_one_never_stopped(kind: str, tmp_path: Path) -> None:
    config = {**QUADRATIC, **KINDS[kind]}
    fedsim.run(config, out=tmp_path / "whole")
    run_interrupted(config, tmp_path / "stopped", 7, 15)
    assert rows_in(tmp_path / "stopped") == rows_in(tmp_path / "whole")
    assert model(tmp_path / "stopped") == model(tmp_path / "whole")
    for name in ("config.yaml", "env.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resume_with_other_workers_keeps_the_cut_that_auto_chose(tmp_path: Path) -> None:
    config = {
        "rounds": 4,
        "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [2000]}},
        "clients": {"count": 8},
        "local": {"steps": 1, "optimizer": {"name": "adam", "lr": 0.01}},
        "runtime": {"workers": 4},
        "evaluate": {"every": 2},
        "checkpoint": {"every": 2},
    }
    fedsim.run(config, out=tmp_path / "whole")
    fedsim.run(config, out=tmp_path / "stopped", rounds=2)
    other = {**config, "runtime": {"workers": 1}}
    assert fedsim.run(other, rounds=1).config["runtime"]["stacks"] == 1
    assert fedsim.run(other, out=tmp_path / "stopped", resume=True).config["runtime"]["stacks"] == 4
    assert rows_in(tmp_path / "stopped") == rows_in(tmp_path / "whole")
    assert model(tmp_path / "stopped") == model(tmp_path / "whole")


def test_what_a_resume_says_itself_is_what_it_says(tmp_path: Path) -> None:
    fedsim.run(QUADRATIC, out=tmp_path / "run", rounds=1, **{"runtime.stack": 2, "runtime.workers": 2})
    own = {"stacks": 3, "engine": "auto"}
    assert results.as_it_began({"runtime": own}, tmp_path / "run")["runtime"] == {**own, "stack": 2}
    with pytest.raises(ConfigError, match="runtime.stacks differs"):
        fedsim.run(QUADRATIC, out=tmp_path / "run", resume=True, **{"runtime.stacks": 3})


def test_client_rows_on_disk_survive_a_stop_too(tmp_path: Path) -> None:
    config = {**QUADRATIC, "strategy": {"name": "scaffold", "cohort_size": 5}}
    fedsim.run(config, out=tmp_path / "ram")
    run_interrupted({**config, "runtime": {"memory": "disk"}}, tmp_path / "disk", 7, 15)
    assert rows_in(tmp_path / "disk") == rows_in(tmp_path / "ram")


def test_tensorboard_shows_every_round_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_interrupted({**QUADRATIC, "log": {"sinks": ["jsonl", "tensorboard"]}}, tmp_path / "run", 7)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("train_loss")]
    assert shown == [(row["round"], row["train_loss"]) for row in rows_in(tmp_path / "run")]


def test_a_stop_in_the_last_round_is_the_end(tmp_path: Path) -> None:
    raw, source = runs.load(QUADRATIC, {})
    runs.execute(raw, source, tmp_path / "run", watch=interrupt_at(20))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 20


def test_a_run_that_reached_its_stop_stays_there(tmp_path: Path) -> None:
    stop = {"stop.virtual_seconds": 2.0}
    fedsim.run(QUADRATIC, out=tmp_path / "run", **stop)
    before = rows_in(tmp_path / "run")
    assert before[-1]["virtual_seconds"] >= 2.0 > before[-2]["virtual_seconds"] and len(before) < 20
    fedsim.run(QUADRATIC, out=tmp_path / "run", resume=True, **stop)
    assert rows_in(tmp_path / "run") == before
    assert "virtual_seconds" in json.loads((tmp_path / "run" / "summary.json").read_text())["ended"]


def test_a_finished_run_goes_on_with_more_rounds_and_its_config_says_so(tmp_path: Path) -> None:
    fedsim.run(QUADRATIC, out=tmp_path / "run", rounds=8)
    fedsim.run(QUADRATIC, out=tmp_path / "run", resume=True)
    fedsim.run(QUADRATIC, out=tmp_path / "whole")
    assert rows_in(tmp_path / "run") == rows_in(tmp_path / "whole")
    assert (tmp_path / "run" / "config.yaml").read_text() == (tmp_path / "whole" / "config.yaml").read_text()


# Full disks and damaged files -------------------------------------------------------------------------------------


def full(*args: Any, **more: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_the_start_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml.part").symlink_to("/dev/full")  # every write to it meets a full disk
    with pytest.raises(
        ConfigError, match=r"run: can't write here: .*No space left.*make room, or choose another --out"
    ):
        fedsim.run(QUADRATIC, out=tmp_path / "run")


def test_a_disk_that_fills_up_stops_the_run_which_goes_on_later(tmp_path: Path) -> None:
    write, count = JsonLines.write, iter(range(1000))

    def fills_up(self: JsonLines, row: Mapping[str, Any]) -> None:
        full() if next(count) == 9 else write(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonLines, "write", fills_up)
        with pytest.raises(ConfigError, match=r"can't write here: .*No space left.*make room, then add --resume"):
            fedsim.run(QUADRATIC, out=tmp_path / "run")
    fedsim.run(QUADRATIC, out=tmp_path / "run", resume=True)
    fedsim.run(QUADRATIC, out=tmp_path / "whole")
    assert rows_in(tmp_path / "run") == rows_in(tmp_path / "whole")


def test_a_disk_full_for_a_checkpoint_keeps_the_one_before(tmp_path: Path) -> None:
    save, count = checkpoint.save_file, iter(range(1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *a: full() if next(count) == 1 else save(*a))
        with pytest.raises(ConfigError, match=r"round-000012: can't write the checkpoint: .*No space left"):
            fedsim.run(QUADRATIC, out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-000006"]
    fedsim.run(QUADRATIC, out=tmp_path / "run", resume=True)
    fedsim.run(QUADRATIC, out=tmp_path / "whole")
    assert rows_in(tmp_path / "run") == rows_in(tmp_path / "whole")


def test_a_disk_full_at_the_end_leaves_the_run_to_be_finished(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json.part").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"run: can't write here: .*No space left.*--resume"):
        fedsim.run(QUADRATIC, out=tmp_path / "run")
    fedsim.run(QUADRATIC, out=tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 20


# Real processes ---------------------------------------------------------------------------------------------------


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """`fedsim run` of a quickstart that would never end."""
    command = [sys.executable, "-m", "fedsim.cli", "run", str(QUICKSTART), "rounds=100000", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(folder), "--quiet"], stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_rows(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        file = folder / "metrics.jsonl"
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} rows in time: {process.communicate()[1]}")


OVERRIDES = ("evaluate.every=2", "checkpoint.every=4", "log.sinks=[jsonl,tensorboard]")


def finish_and_compare(folder: Path, rounds: int) -> None:
    more = (*OVERRIDES, f"rounds={rounds}")
    assert console("run", QUICKSTART, *more, "--out", folder, "--resume", "-q").code == 0
    whole = folder.with_name("whole")
    assert console("run", QUICKSTART, *more, "--out", whole, "-q").code == 0
    assert rows_in(folder) == rows_in(whole) and model(folder) == model(whole)


@pytest.mark.timeout(300)
def test_ctrl_c_saves_exits_130_and_the_resumed_run_equals_one_never_stopped(tmp_path: Path) -> None:
    process = start(tmp_path / "run", *OVERRIDES)
    wait_for_rows(tmp_path / "run", process, 6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    done = len(rows_in(tmp_path / "run"))
    assert err == f"fedsim: stopped after round {done}; add --resume to go on\n"
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"round-{done:06d}"
    finish_and_compare(tmp_path / "run", done + 5)


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    process = start(tmp_path / "run", *OVERRIDES)
    wait_for_rows(tmp_path / "run", process, 10)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    done = len(rows_in(tmp_path / "run"))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 99999, "train_l')  # a row cut short, as a crash leaves it
    finish_and_compare(tmp_path / "run", done + 3)
