"""Sweeps as a user meets them: folders, results, going on, and mistakes. One trial at a time, in this process."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsim import runs
from fedsim.config import ConfigError
from fedsim.history import History
from fedsim.sweep import Results, Stopped, Sweep, Watch, parse_space, play
from fedsim.sweep.machine import Machine
from fedsim.sweep.results import Record
from fedsim.sweep.space import Setting
from fedsim.sweep.trials import Trial
from tests.fedsim.console import Outcome, contents, fedsim

QUAD = """\
rounds: 6
task: {name: quadratic, dim: 3}
clients: {count: 5}
strategy: {name: fedavg}
local: {steps: 4, optimizer: {name: sgd, lr: 0.1}}
evaluate: {every: 2}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "quad.yaml").write_text(QUAD)
    monkeypatch.chdir(tmp_path)
    return Path("quad.yaml")


def command(config: Path, *args: object, out: str = "grid") -> Outcome:
    return fedsim("sweep", config, *args, "--jobs", 1, "--out", out)


def results(config: Path, *texts: str, per: str | None = None, watch: Watch | None = None, **more: Any) -> Results:
    space = parse_space(texts, per, str(config))
    return play(Sweep(config=config, space=space, folder=Path("grid"), jobs=1, **more), watch or Watch())


class Heard(Watch):
    """Notes how trials ended."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, bool]] = []

    def ended(self, record: Record, target: str | None, before: bool) -> None:
        self.said.append((record.trial.folder.name, record.ended.status, before))


def test_every_run_has_a_folder_and_all_are_shown_with_seeds_folded(config: Path) -> None:
    found = command(config, "local.optimizer.lr=0.05,0.1", "rounds=4", "--seeds", "0,1")
    assert found.code == 0 and found.err == ""
    folders = [f"lr={lr},seed={seed}" for lr in (0.05, 0.1) for seed in (0, 1)]
    for name in folders:
        assert f"grid/{name}: done, distance" in found.out
        assert json.loads((Path("grid") / name / "summary.json").read_text())["rounds"] == 4
    assert " best " in found.out and "2 of 2" in found.out and "±" in found.out
    assert "</html>" in Path("grid/report.html").read_text()
    last = [History.load(Path("grid") / name).last("distance") for name in folders]
    lines = [json.loads(line) for line in Path("grid/sweep.jsonl").read_text().splitlines()]
    assert [line["folder"] for line in lines] == folders and [line["distance"] for line in lines] == last
    table = list(csv.DictReader(Path("grid/sweep.csv").read_text().splitlines()))
    assert [(row["local.optimizer.lr"], row["seed"], row["status"]) for row in table] == [
        (lr, seed, "done") for lr in ("0.05", "0.1") for seed in ("0", "1")
    ]


def test_seeds_are_folded_to_mean_and_sample_deviation_and_the_best_is_the_least_distance(config: Path) -> None:
    found = results(config, "local.optimizer.lr=0.05,0.1", seeds=(0, 1, 2))
    ends = {lr: [History.load(f"grid/lr={lr},seed={seed}").last("distance") for seed in range(3)] for lr in (0.05, 0.1)}
    assert found.target == "distance" and found.minimise
    for row in found.rows:
        values = ends[row.setting.values["local.optimizer.lr"]]
        mean = sum(values) / 3
        assert row.value == pytest.approx(mean, rel=1e-12) and row.num == 3
        assert row.deviation == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5, rel=1e-12)
    best = min(ends, key=lambda lr: sum(ends[lr]))
    assert found.best[""].setting.values == {"local.optimizer.lr": best} and found.rows[0] is found.best[""]


def test_the_best_setting_of_each_method_can_be_run_again(config: Path) -> None:
    found = results(
        config,
        "strategy.name=fedavg,fedavg_m",
        "local.optimizer.lr=0.01,0.1",
        "fedavg_m:strategy.beta=0.5,0.9",
        per="strategy.name",
    )
    assert len(found.records) == 6 and set(found.best) == {"fedavg", "fedavg_m"}
    for method, row in found.best.items():
        others = [r for r in found.rows if r.setting.method == method]
        assert row.value == min(r.value for r in others if r.value is not None)
        assert fedsim("run", f"grid/best-{method}.yaml", "--out", f"again-{method}", "-q").code == 0
        again = History.load(f"again-{method}")
        assert again.last("distance") == row.value
    assert found.best["fedavg"].setting.values["local.optimizer.lr"] == 0.1


def test_a_large_value_is_good_unless_it_is_a_loss_or_the_user_says_so(config: Path) -> None:
    for folder, target, more, expected in (
        ("a", "bits_up", [], 9),
        ("b", "bits_up", ["--minimise"], 3),
        ("c", "test_loss", [], 9),
    ):
        found = command(config, "rounds=3,9", "--target", target, *more, out=folder)
        assert found.code == 0, found
        assert json.loads(json.dumps(runs.load(f"{folder}/best.yaml", {})[0]))["rounds"] == expected


def test_a_best_value_at_the_end_of_its_list_is_said(config: Path) -> None:
    rates = "local.optimizer.lr=0.01,0.05,0.1"
    assert "best local.optimizer.lr (0.1) is at the end of what was tried" in command(config, rates).out
    assert "at the end" not in command(config, f"{rates},1e30").out  # the first three are there already


def test_a_run_of_a_sweep_is_the_run_of_its_overrides(config: Path) -> None:
    results(config, "local.optimizer.lr=0.05", seeds=(3,))
    assert fedsim("run", config, "local.optimizer.lr=0.05", "seed=3", "--out", "alone", "-q").code == 0
    model = "model.safetensors"
    assert (Path("grid/seed=3") / model).read_bytes() == (Path("alone") / model).read_bytes()


def test_a_sweep_that_was_stopped_is_completed(config: Path) -> None:
    results(config, "rounds=6", seeds=(0,))
    before = contents(Path("grid/seed=0"))
    raw, source = runs.load(config, {"seed": 1, "rounds": 6})
    (Path("grid") / "seed=1").mkdir()
    (Path("grid") / "seed=1" / "trial.json").write_text(json.dumps({"config": raw}))
    runs.execute({**raw, "rounds": 3}, source, Path("grid/seed=1"))  # as if it had been stopped there
    (Path("grid/seed=1") / "summary.json").unlink()
    heard = Heard()
    found = results(config, "rounds=6", seeds=(0, 1, 2), watch=heard)
    assert heard.said == [("seed=0", "done", True), ("seed=1", "done", False), ("seed=2", "done", False)]
    assert contents(Path("grid/seed=0")) == before and found.rows[0].num == 3
    rows = [json.loads(line) for line in (Path("grid/seed=1") / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, 7))


def test_what_diverges_or_fails_does_not_stop_the_others_and_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep_mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedsim.strategies.fedavg import FedAvg\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Fails(FedAvg):\n"
        "    def round(self, s, fleet, rng):\n"
        "        raise IndexError('my own trouble')\n"
    )
    found = command(config, "strategy.name=fedavg,sweep_mine:Fails", "local.optimizer.lr=1e30,0.1")
    assert found.code == 1
    assert "3 of 4 trials did not come to their end" in found.err and found.err.count("IndexError: my own trouble") == 2
    assert "grid/name=fedavg,lr=1e+30 diverged: round 1:" in found.err
    assert "grid/name=fedavg,lr=0.1: done" in found.out
    trouble = Path("grid/name=sweep_mine-Fails,lr=0.1/error.txt").read_text()
    assert "Traceback" in trouble and "sweep_mine.py" in trouble
    # what diverged would diverge again; what failed may have been mended
    heard = Heard()
    mended = (tmp_path / "sweep_mine.py").read_text().partition("    def round")[0] + "    pass\n"
    monkeypatch.setattr("sys.modules", {k: v for k, v in __import__("sys").modules.items() if k != "sweep_mine"})
    (tmp_path / "sweep_mine.py").write_text(mended)
    results(config, "strategy.name=fedavg,sweep_mine:Fails", "local.optimizer.lr=1e30,0.1", watch=heard)
    assert [said[1:] for said in heard.said] == [
        ("diverged", True),
        ("done", True),
        ("diverged", False),
        ("done", False),
    ]
    assert not Path("grid/name=sweep_mine-Fails,lr=0.1/error.txt").exists()


def test_a_setting_that_lost_a_seed_is_not_the_best(config: Path) -> None:
    results(config, "rounds=1,9", seeds=(0, 1))
    diverge(Path("grid/rounds=9,seed=1"))
    found = results(config, "rounds=1,9", seeds=(0, 1))
    assert found.best[""].setting.values == {"rounds": 1}
    assert [(row.num, row.whole) for row in found.rows] == [(2, True), (1, False)]
    assert runs.load("grid/best.yaml", {})[0]["rounds"] == 1
    diverge(Path("grid/rounds=1,seed=0"))
    assert results(config, "rounds=1,9", seeds=(0, 1)).best == {} and not Path("grid/best.yaml").exists()


def diverge(folder: Path) -> None:
    """Have a trial's folder say that it diverged."""
    said = json.loads((folder / "trial.json").read_text())
    (folder / "summary.json").unlink()
    (folder / "trial.json").write_text(json.dumps({**said, "status": "diverged", "why": "as a test"}))


def test_a_setting_whose_seeds_are_still_to_come_is_not_the_best(config: Path) -> None:
    class Stops(Watch):
        def ended(self, record: Record, target: str | None, before: bool) -> None:
            if record.trial.folder.name == "rounds=9,seed=0":
                raise Stopped(signal.SIGINT)

    with pytest.raises(Stopped):
        results(config, "rounds=1,9", seeds=(0, 1), watch=Stops())
    assert len(Path("grid/sweep.jsonl").read_text().splitlines()) == 3
    assert runs.load("grid/best.yaml", {})[0]["rounds"] == 1  # although 9 rounds come nearer


def test_a_failed_trial_that_was_completed_by_hand_is_done(config: Path) -> None:
    results(config, seeds=(0,))
    file = Path("grid/seed=0/trial.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "failed", "why": "memory ran out"}))
    heard = Heard()
    assert results(config, seeds=(0,), watch=heard).troubled == []
    assert heard.said == [("seed=0", "done", True)]


def test_a_trial_goes_on_with_the_stacks_that_it_began_with(config: Path) -> None:
    raw, source = runs.load(config, {"runtime.memory": "ram"})
    folder = Path("grid/seed=0")
    runs.execute({**raw, "runtime": {**raw["runtime"], "stacks": 3}}, source, folder)
    machine = Machine(jobs=2, threads=1, gpus=0, address=None, folder=Path("grid"))
    trial = Trial(Setting("", {}, {}), None, raw, source, folder)
    assert machine.job(trial).raw["runtime"]["stacks"] == 3
    assert machine.job(replace(trial, folder=Path("elsewhere"))).raw["runtime"]["stacks"] != 3


def test_a_search_draws_from_ranges_and_is_the_same_again(config: Path) -> None:
    for search in ("random", "tpe"):
        args = ["local.optimizer.lr=log(1e-3,0.2)", "--search", search, "--trials", 3, "--seeds", "0,1"]
        found = command(config, *args, out=search)
        assert found.code == 0 and f"{search}: 6 trials" in found.out, found
        before = {p: p.stat().st_mtime_ns for p in Path(search).rglob("summary.json")}
        assert len(before) == 6
        again = command(config, *args, out=search)
        assert again.code == 0 and again.out.count("done before") == 6
        assert {p: p.stat().st_mtime_ns for p in Path(search).rglob("summary.json")} == before


def test_a_proposal_that_makes_no_sense_is_one_failed_trial(config: Path) -> None:
    found = command(config, "local={steps: 4, epochs: 1},{steps: 2}", "--search", "tpe", "--trials", 2)
    assert found.code == 2 and "local: give either epochs or steps" in found.err and not Path("grid").exists()


Q = ["quad.yaml"]
LR = ["quad.yaml", "local.optimizer.lr=0.05,0.1"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing to go through": (Q, "sweep: no axis; give key=a,b for some keys, or --seeds"),
    "only fixed keys": ([*Q, "rounds=1"], "sweep: no axis"),
    "nothing to search": ([*Q, "rounds=1", "--search", "tpe", "--trials", "3"], "no axis to search"),
    "an empty value": ([*Q, "rounds="], "rounds=: has an empty value"),
    "a range that is empty": ([*Q, "rounds=int(5,1)", "--search", "random", "--trials", "3"], "lower end comes first"),
    "a range in a grid": ([*Q, "rounds=int(1,5)"], "is a range; add --search random or tpe"),
    "an unknown key": ([*Q, "local.optimizer.lrr=0.1,0.2"], "lrr: unknown key; did you mean 'lr'"),
    "a wrong value among right ones": ([*Q, "strategy.server_lr=1.0,fast"], "server_lr: expected a number, got 'fast'"),
    "an unknown search": ([*LR, "--search", "grit"], "--search: unknown name 'grit'; did you mean 'grid'"),
    "no number of trials": ([*LR, "--search", "random"], "--trials: random needs a number of settings"),
    "trials of a grid": ([*LR, "--trials", "3"], "--trials: a grid has as many as it has"),
    "seeds that are none": ([*LR, "--seeds", "0,x"], "--seeds: expected whole numbers, as in --seeds 0,1,2"),
    "a seed twice": ([*LR, "--seeds", "1,1"], "--seeds: give every seed once"),
    "seeds and a seed": ([*LR, "seed=1", "--seeds", "0,1"], "seed: is given twice"),
    "seeds as an axis": ([*LR, "seed=0,1"], "seed: give seeds as --seeds"),
    "no jobs": ([*LR, "--jobs", "0"], "--jobs: must be at least 1 or auto"),
    "jobs that are none": ([*LR, "--jobs", "many"], "--jobs: expected auto or a whole number, got 'many'"),
    "two numbers of jobs": ([*LR, "--jobs", "2,3"], "--jobs: expected auto or a whole number, got '2,3'"),
    "nothing ahead": ([*LR, "--ahead", "0"], "--ahead: must be at least 1"),
    "per no axis": ([*LR, "--per", "strategy.name"], "--per strategy.name: is no list of values"),
    "workers of its own": ([*LR, "runtime.executor=ray", "--jobs", "2"], "use --jobs 1"),
    "a file for a folder": ([*LR, "--jobs", "1", "--out", "quad.yaml"], "quad.yaml: can't write here"),
    "no such file": (["quat.yaml", "rounds=1,2"], "quat.yaml: no such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_exit_2_and_nothing_touched(mistake: str, config: Path) -> None:
    args, words = MISTAKES[mistake]
    found = fedsim("sweep", *args)
    assert found.code == 2 and found.err.count("\n") == 1 and words in found.err, found
    assert [p.name for p in Path().iterdir()] == ["quad.yaml"]


def test_a_target_that_no_row_has_ends_the_sweep_with_the_first_trial(config: Path) -> None:
    found = command(config, "rounds=2,3", "--target", "distence")
    assert found.code == 2 and found.err.count("\n") == 1
    assert "--target distence: no row of grid/rounds=2 has it; did you mean 'distance'?" in found.err
    assert not Path("grid/rounds=3").exists()
    assert command(config, "rounds=2,3", "--target", "distance").code == 0


def test_another_sweep_does_not_mix_into_a_folder(config: Path) -> None:
    results(config, seeds=(0,))
    with pytest.raises(ConfigError, match="grid/seed=0 holds a run of another sweep; give another --out"):
        results(config, "rounds=9", seeds=(0,))
    runs.execute(*runs.load(config, {"seed": 7}), Path("grid/seed=7"))
    with pytest.raises(ConfigError, match="grid/seed=7 holds a run of its own; give another --out"):
        results(config, seeds=(7,))


@pytest.mark.parametrize("args", [["sweep", *LR], ["list"], ["tune", *Q]])
def test_under_torchrun_what_makes_no_sense_there_is_refused(
    args: list[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(key, str(value))
    found = fedsim(*args)
    assert (
        found.code == 2
        and found.out == ""
        and found.err
        == (f"fedsim: fedsim {args[0]}: 2 processes of torchrun would all do the same; call it without torchrun\n")
    )
