"""The command line as a user meets it: results, tables, and one clear message for every kind of mistake."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedsim import cli
from fedsim.cli import one_line
from fedsim.compose import TABLES
from fedsim.data.images import CHECKSUMS
from fedsim.metrics import EVALUATED, RESERVED
from fedsim.sim.executor import Jobs, Lost, Results
from fedsim.sim.in_process import InProcess
from fedsim.sim.ray_pool import WorkersLost
from tests.fedsim.console import Outcome, contents, fedsim

QUAD = """\
rounds: 4
task: {name: quadratic, a: [1, 3], b: [0, 1], x0: 2}
strategy: {name: fedavg}
local: {steps: 10, optimizer: {name: sgd, lr: 0.1}}
evaluate: {every: 1}
checkpoint: {every: 2}
"""
DIGITS = """\
rounds: 1
task: {name: classification, dataset: digits, model: {name: logistic}}
clients: {count: 10}
strategy: {name: fedavg, cohort_size: 2}
local: {epochs: 1, batch_size: 20, optimizer: {name: sgd, lr: 0.1}}
"""
MINE = '''\
"""What a user might bring."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import fedsim
from fedsim.clients.local_training import LocalTraining
from fedsim import FederatedData

text = "not callable"


def a_list(*, num_classes):
    return [num_classes]


def raising(*, num_classes):
    raise KeyError("inside the factory")


def too_few_classes(*, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def wrong_shape(*, num_classes):
    return nn.Linear(5, num_classes)


def lazy(*, num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def holes():
    x = np.zeros((10, 4), np.float32)
    x[3, 2] = np.nan
    return x, np.arange(10) % 2


def no_data():
    raise ZeroDivisionError("no data today")


def nobody():
    none = torch.zeros(0, dtype=torch.int64)
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    offsets = torch.zeros(6, dtype=torch.int64)
    return FederatedData(
        inputs=x, targets=y, offsets=offsets, order=none, test_inputs=x, test_targets=y, num_classes=2
    )


class NotAStrategy:
    pass


class Plain(fedsim.Strategy):
    def init(self, x0):
        return State(x0)

    def round(self, s, fleet, rng):
        self.count = 1 + getattr(self, "count", 0)
        return s, {}


@dataclass
class Thawed(Plain):
    count: int = 0


@dataclass(frozen=True)
class State:
    x: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ClientFails(fedsim.Strategy):
    local: LocalTraining

    def init(self, x0):
        return State(x0)

    def round(self, s, fleet, rng):
        fleet.ask(fleet.clients[1:], self.work, x=s.x)
        return s, {}

    def work(self, clients, x):
        raise ZeroDivisionError("this client's own trouble")


@dataclass(frozen=True)
class ServerFails(ClientFails):
    def round(self, s, fleet, rng):
        raise IndexError("the server's own trouble")


@dataclass(frozen=True)
class NoModel(ClientFails):
    def init(self, x0):
        return {"x": x0}


class Subclass(NoModel):
    pass


@dataclass(frozen=True)
class InitFails(ClientFails):
    def init(self, x0):
        raise IndexError("the server's own trouble")


@dataclass(frozen=True, kw_only=True)
class Returns(ClientFails):
    what: str

    def round(self, s, fleet, rng):
        return eval(self.what)


@dataclass(frozen=True, kw_only=True)
class Says(fedsim.Strategy):
    server: str = "fine"
    client: str = "fine"

    def init(self, x0):
        return State(x0)

    def round(self, s, fleet, rng):
        fleet.ask(fleet.clients, self.work, x=s.x)
        return s, {self.server: 1}

    def work(self, clients, x):
        clients.log(**{self.client: torch.ones(len(clients))})
        return {"x": x.expand(len(clients), -1)}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with experiments, the user's own code and data good and bad, and the run of an earlier experiment."""
    root = tmp_path_factory.mktemp("cli")
    (root / "quad.yaml").write_text(QUAD)
    (root / "digits.yaml").write_text(DIGITS)
    (root / "bare.yaml").write_text("".join(line for line in QUAD.splitlines(True) if not line.startswith("local")))
    (root / "cli_mine.py").write_text(MINE)
    (root / "cli_broken.py").write_text("raise RuntimeError('broken at import')\n")
    (root / "half.yaml").write_text("rounds: [1\n")
    (root / "list.yaml").write_text("- a\n- b\n")
    (root / "bytes.yaml").write_bytes(b"\x90\xff\x00")
    (root / "twice.yaml").write_text("rounds: 1\nrounds: 2\n")
    (root / "holes.csv").write_text("client,seconds_per_step\n0,0.1\n1,0.1\n3,0.1\n")
    (root / "a_file").write_text("hello\n")
    (root / "images").mkdir()
    for name in CHECKSUMS:
        (root / "images" / name).write_bytes(gzip.compress(bytes(5000))[:20])
    np.savez(root / "unnamed.npz", features=np.zeros((4, 2)))
    np.savez(root / "labels.npz", x=np.zeros((6, 2), np.float32), y=[0, 1, 0, 1, 2, 10**9])
    with zipfile.ZipFile(root / "declared.npz", "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 9)})
    (root / "deep.yaml").write_text("a: " + "{a: " * 600 + "1" + "}" * 601)
    (root / "endless.yaml").write_text("a: &a [*a]\n")
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)]
    (root / "laughs.yaml").write_text("a0: &a0 [lol]\n" + "".join(lines))
    (root / "pipes").mkdir()
    for name in ("pipe.yaml", "pipe.npz", "pipes/a.csv"):
        os.mkfifo(root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert fedsim("run", "quad.yaml", "--out", "used", "-q").code == 0
    yield root
    for name in ("cli_mine", "cli_broken"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


Q, D = "quad.yaml", "digits.yaml"
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown section": ([Q, "roundz=3"], ["quad.yaml: roundz:", "did you mean 'rounds'"]),
    "unknown key": ([D, "strategy.cohortsize=3"], ["digits.yaml: strategy.cohortsize:", "did you mean 'cohort_size'"]),
    "unknown name": ([Q, "strategy.name=fedagv"], ["strategy.name:", "'fedagv'", "did you mean 'fedavg'"]),
    "unknown optimizer": ([Q, "local.optimizer.name=sdg"], ["local.optimizer.name:", "'sdg'", "did you mean 'sgd'"]),
    "unknown optimizer key": ([Q, "local.optimizer.lrr=1"], ["local.optimizer", "lrr", "did you mean 'lr'"]),
    "a number for an optimizer": ([Q, "local.optimizer=3"], ["local.optimizer: expected a name or", "got 3", "sgd"]),
    "a section for a name": (
        [Q, "local.optimizer={name: {a: 1}}"],
        ["local.optimizer: expected a name or", "got {'name': {'a': 1}}"],
    ),
    "unknown sink": (
        [Q, "log.sinks=[tensorbord]"],
        ["log.sinks[0].name:", "'tensorbord'", "did you mean 'tensorboard'"],
    ),
    "unknown table": ([Q, "task=clasification"], ["task.name:", "did you mean 'classification'"]),
    "unknown device": ([Q, "runtime.device=tpu9"], ["runtime.device:", "'tpu9'", "use cpu"]),
    "a device of another kind": ([Q, "runtime.device=mps"], ["runtime.device: unknown device 'mps'", "use cpu"]),
    "unknown engine": ([D, "runtime.engine=fast"], ["runtime.engine:", "one of auto, loop, stacked", "'fast'"]),
    "wrong type": ([Q, "rounds=1.5"], ["rounds: expected a whole number, got 1.5"]),
    "text for a number": ([D, "strategy.cohort_size=ten"], ["strategy.cohort_size: expected a whole number", "'ten'"]),
    "number for a list": ([D, "task.model={name: mlp, hidden: 9}"], ["task.model.hidden: expected a list", "got 9"]),
    "key below a number": ([Q, "rounds.a=3"], ["rounds: expected a whole number"]),
    "out of range": ([Q, "rounds=0"], ["rounds: must be at least 1, got 0"]),
    "accuracy in percent": ([D, "stop.test_accuracy=90"], ["stop: test_accuracy is a share", "got 90"]),
    "null for a number": ([Q, "rounds=null"], ["rounds: expected a whole number, got null"]),
    "no workers": ([Q, "runtime.workers=0"], ["runtime: workers must be at least 1 or auto, got 0"]),
    "no patience": ([Q, "runtime.timeout_seconds=0"], ["runtime: timeout_seconds must be positive, got 0"]),
    "fewer rounds than there are": (
        [Q, "rounds=2", "--out", "used", "--resume"],
        ["rounds: used already has 4", "than 2"],
    ),
    "no batch": ([Q, "local.batch_size=0"], ["local: batch_size must be at least 1, got 0"]),
    "epochs and steps": ([Q, "local.epochs=1"], ["local: give either epochs or steps"]),
    "override without value": ([Q, "rounds"], ["override 'rounds'", "write key.sub=value"]),
    "override with half an index": ([Q, "[local==x"], ["override '[local==x' has no key", "write key.sub=value"]),
    "override without spaces": ([Q, "strategy={name:fedavg}"], ["'strategy={name:fedavg}'", "a space after each ':'"]),
    "nested without spaces": ([Q, "a={name:b,c:{d:1}}"], ["not readable", "a space after each ':'"]),
    "missing file": (["quat.yaml"], ["quat.yaml: no such file", "did you mean 'quad.yaml'"]),
    "folder for a file": (["images"], ["images: is a folder", "name an experiment file"]),
    "a pipe for a file": (["pipe.yaml"], ["pipe.yaml: is no regular file"]),
    "nested too deeply": (["deep.yaml"], ["deep.yaml: not readable"]),
    "nested in itself": (["endless.yaml"], ["endless.yaml: not readable", "alias"]),
    "nested a billion times": (["laughs.yaml"], ["laughs.yaml: not readable", "expan"]),
    "broken YAML": (["half.yaml"], ["half.yaml: not readable", "line 1"]),
    "list at the top": (["list.yaml"], ["list.yaml: expected sections at the top"]),
    "bytes for text": (["bytes.yaml"], ["bytes.yaml: not readable", "utf-8"]),
    "key given twice": (["twice.yaml"], ["twice.yaml: not readable", "duplicate key rounds", "line 2"]),
    "cohort too large": ([D, "strategy.cohort_size=11"], ["strategy.cohort_size: 11 exceeds the 10 clients", "lower"]),
    "f too large": (
        [D, "strategy.aggregator={name: krum, f: 1}"],
        ["strategy.aggregator:", "2 replies at a time", "f=1", "lower f"],
    ),
    "no interval": ([Q, "strategy={name: fedfix, interval: 0}"], ["strategy: interval must be positive", "got 0"]),
    "key left out": ([Q, "strategy=fedfix"], ["strategy.interval: missing"]),
    "biased compressor": (
        [Q, "local=null", "strategy={name: masha1, lr: 0.1, compressor: {name: top_k, k: 1}}"],
        ["strategy:", "biased", "masha2"],
    ),
    "k beyond the model": ([D, "uplink.compressor={name: top_k, k: 10000}"], ["uplink.compressor:", "k=10000", "650"]),
    "nothing to feed back": ([Q, "uplink.error_feedback=true"], ["uplink.error_feedback: needs an uplink.compressor"]),
    "all byzantine": ([Q, "clients.byzantine={count: 2}"], ["clients.byzantine: count", "honest", "got 2"]),
    "labels to poison": (
        [Q, "clients.byzantine={count: 1, attack: label_flip}"],
        ["clients.byzantine.attack: poisons labels"],
    ),
    "device file missing": ([Q, "clients.devices={name: trace, path: no.csv}"], ["clients.devices:", "no.csv"]),
    "device file with holes": (
        [D, "clients.count=4", "clients.devices={name: trace, path: holes.csv}"],
        ["clients.devices: holes.csv", "no line for 1 of 4 clients (2)"],
    ),
    "truncated images": (
        [D, "task.dataset=fashion_mnist", "data.root=images"],
        ["task.dataset: images/train-images-idx3-ubyte.gz: cannot be read as gzip", "delete it"],
    ),
    "missing data": ([D, "task.dataset={name: npz, path: no.npz}"], ["task.dataset:", "no file", "no.npz"]),
    "a pipe for data": ([D, "task.dataset={name: npz, path: pipe.npz}"], ["pipe.npz: is no regular file"]),
    "a pipe among data": ([D, "task.dataset={name: csv, path: pipes}"], ["pipes/a.csv: is no regular file"]),
    "labels beyond rows": (
        [D, "task.dataset={name: npz, path: labels.npz}"],
        ["task.dataset: labels.npz: labels go up to 1,000,000,000 in 6 rows", "set num_classes"],
    ),
    "arrays beyond memory": (
        [D, "task.dataset={name: npz, path: declared.npz}"],
        ["declared.npz: cannot be read as .npz (Unable to allocate"],
    ),
    "unreadable data": ([D, "task.dataset={name: npz, path: a_file}"], ["task.dataset: a_file: not an .npz"]),
    "data without keys": ([D, "task.dataset={name: npz, path: unnamed.npz}"], ["no key 'x'", "features"]),
    "holes in the data": ([D, "task.dataset=cli_mine:holes"], ["task.dataset:", "NaN"]),
    "data that raises": ([D, "task.dataset=cli_mine:no_data"], ["task.dataset: ZeroDivisionError: no data today"]),
    "empty partition": (
        [D, "task.dataset=cli_mine:nobody"],
        ["task.dataset:", "the partition is empty, none of the 5"],
    ),
    "no classes": ([D, "partition={name: classes, classes_per_client: 0}"], ["partition:", "classes_per_client", "0"]),
    "no natural clients": ([D, "partition=natural"], ["partition:", "names no clients", "another partition"]),
    "partition out of range": ([D, "partition={name: dirichlet, alpha: -1}"], ["partition:", "alpha", "-1"]),
    "ragged numbers": ([Q, "task={name: quadratic, a: [1, 2], b: [[1, 2], [3]]}"], ["task: b:", "same shape"]),
    "one number for all": ([Q, "task.a=1"], ["task: a: give one entry per client, such as [1, 3], got 1"]),
    "a formula beyond memory": (
        [Q, "local=null", "task={name: bilinear, dim: 100000000}", "strategy={name: masha1, lr: 0.1}"],
        ["task: too large for this machine's memory", "Unable to allocate"],
    ),
    "unequal numbers": ([Q, "task={name: quadratic, a: [1, 2, 3], b: [1, 2]}"], ["task.a", "one entry per client"]),
    "no such module": (
        [D, "task.model=cli_none:make"],
        ["task.model.name: can't import 'cli_none:make'", "PYTHONPATH"],
    ),
    "no such attribute": ([D, "task.model=cli_mine:nothing"], ["task.model.name:", "'cli_mine' has no 'nothing'"]),
    "module that raises": ([D, "task.model=cli_broken:make"], ["task.model.name:", "RuntimeError: broken at import"]),
    "not callable": ([D, "task.model=cli_mine:text"], ["task.model.name:", "is a str, not a class or function"]),
    "no module made": ([D, "task.model=cli_mine:a_list"], ["task.model:", "gave a list, not a torch.nn.Module"]),
    "factory that raises": ([D, "task.model=cli_mine:raising"], ["task.model: KeyError", "cli_mine.py, line"]),
    "too few logits": ([D, "task.model=cli_mine:too_few_classes"], ["task.model:", "(3, 3)", "(3, 10)"]),
    "layer of no size": (
        [D, "task.model=cli_mine:lazy"],
        ["task.model: 1 is a LazyLinear, whose size is not known", "num_classes"],
    ),
    "a number to clip by": ([D, "local.optimizer.clip=1.0"], ["local.optimizer.clip: write {global: 1.0}", "got 1.0"]),
    "schedule by name": (
        [D, "local.optimizer.schedule=cosine"],
        ["local.optimizer.schedule: expected a section of key: value lines (name, unit, length, ", "got 'cosine'"],
    ),
    "schedule without end": ([D, "local.optimizer.schedule={name: cosine}"], ["schedule: length must be a positive"]),
    "file name too long": ([f"{'x' * 300}.yaml"], ["xxx.yaml: File name too long; name another"]),
    "out too long": ([Q, "--out", "x" * 300], ["File name too long; name another file or folder"]),
    "model of other inputs": ([D, "task.model=cli_mine:wrong_shape"], ["task.model: can't take samples of", "8, 8"]),
    "no strategy": ([Q, "strategy=cli_mine:NotAStrategy"], ["strategy.name:", "no strategy", "(fedsim.Strategy)"]),
    "counts on itself": ([Q, "strategy=cli_mine:Plain"], ["strategy.name: Plain is not a frozen dataclass"]),
    "thawed": ([Q, "strategy=cli_mine:Thawed"], ["strategy.name: Thawed is not a frozen dataclass", "frozen=True"]),
    "subclass": ([Q, "strategy=cli_mine:Subclass"], ["strategy.name: Subclass is not a frozen dataclass"]),
    "out is a file": ([Q, "--out", "a_file"], ["a_file: can't write here", "another --out"]),
    "out below a file": ([Q, "--out", "a_file/sub"], ["a_file/sub: can't write here", "another --out"]),
    "out in use": ([Q, "--out", "used"], ["used already holds a run", "--resume"]),
    "nothing to resume": ([Q, "--out", "fresh", "--resume"], ["fresh holds no run to resume"]),
    "never run": ([D, "--resume"], ["runs holds no run of digits;"]),
    "another config": (
        [Q, "--out", "used", "--resume", "strategy=scaffold"],
        ["used/checkpoints/round-000004: belongs to another config (strategy differs)", "another folder"],
    ),
    "another seed": ([Q, "--out", "used", "--resume", "seed=1", "rounds=9"], ["another config (seed differs)"]),
    "option without value": ([Q, "--out"], ["'--out' requires an argument"]),
    "unknown option": ([Q, "--resum"], ["No such option", "--resume"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_exit_2_and_nothing_touched(mistake: str, folder: Path) -> None:
    args, words = MISTAKES[mistake]
    before = contents(folder)
    found = fedsim("run", *args)
    assert found.code == 2, found
    assert found.err.startswith("fedsim: ") and found.err.count("\n") == 1, found.err
    for word in words:
        assert word in found.err, found.err
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["run", "check"]),
        (("nosuch",), ["No such command 'nosuch'", "fedsim --help says what there is"]),
        (("run",), ["Missing argument 'CONFIG'", "fedsim run --help says what there is"]),
        (("run", "digits.yaml", "--rounds", "3"), ["No such option '--rounds'", "set without dashes: rounds=20"]),
        (("sweep", "digits.yaml"), ["sweep: no axis", "key=a,b"]),
        (("sweep", "digits.yaml", "rounds=1"), ["sweep: no axis", "key=a,b"]),
        (("list", "strategies", "fedfx"), ["strategies.name: unknown name 'fedfx'; did you mean 'fedfix'"]),
        (("init", "--strategy", "fedfx"), ["--strategy.name: unknown name 'fedfx'; did you mean 'fedfix'"]),
        (("init", "--out", "digits.yaml"), ["digits.yaml is already there", "another --out"]),
        (("list", "fedfix"), ["unknown table 'fedfix'; try fedsim list strategies fedfix"]),
        (("list", "strateges"), ["unknown table 'strateges'", "did you mean 'strategies'"]),
        (("compare", "nowhere"), ["nowhere", "metrics.jsonl"]),
        (("report", "nowhere"), ["nowhere", "metrics.jsonl"]),
        (("check", "digits.yaml", "strategy.cohort_size=11"), ["strategy.cohort_size: 11 exceeds"]),
        (("tune", "digits.yaml", "strategy.cohort_size=11"), ["strategy.cohort_size: 11 exceeds"]),
    ],
)
def test_every_command_answers_mistakes_with_exit_2(args: tuple[str, ...], words: list[str]) -> None:
    found = fedsim(*args)
    assert found.code == 2 and "Traceback" not in found.err
    assert all(word in found.err + found.out for word in words), found


def test_a_run_that_diverges_says_so_with_exit_1_and_keeps_its_rows(tmp_path: Path) -> None:
    found = fedsim("run", Q, "rounds=50", "local.optimizer.lr=1000", "--out", tmp_path / "run")
    assert found.code == 1 and found.err.count("\n") == 1
    assert "not finite, the run diverged; lower local.optimizer.lr" in found.err
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train_loss"] is None and "train_loss" in last["nonfinite"]


def test_a_run_may_be_told_to_go_on_after_divergence(tmp_path: Path) -> None:
    found = fedsim("run", Q, "local.optimizer.lr=1e30", "allow_divergence=true", "--out", tmp_path / "run")
    assert found.code == 0 and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_failing_client_half_is_shown_with_client_round_and_its_own_exception(tmp_path: Path) -> None:
    found = fedsim("run", Q, "strategy=cli_mine:ClientFails", "--out", tmp_path / "run")
    assert found.code == 1
    assert "cli_mine.py" in found.err and 'ZeroDivisionError("this client\'s own trouble")' in found.err
    last = found.err.splitlines()[-1]
    assert (
        last.startswith("fedsim: ClientFails.work failed in round ")
        and "client(s) 1:" in last
        and "ZeroDivisionError" in last
    )


@pytest.mark.parametrize("where", ["ServerFails.round failed in round 1", "InitFails.init failed in the start"])
def test_a_failing_server_half_is_shown_with_its_round_and_its_own_exception(where: str, tmp_path: Path) -> None:
    found = fedsim("run", Q, f"strategy=cli_mine:{where.partition('.')[0]}", "--out", tmp_path / "run")
    assert found.code == 1 and "cli_mine.py" in found.err
    assert found.err.splitlines()[-1] == f"fedsim: {where}: IndexError: the server's own trouble"


@pytest.mark.parametrize("what", [Lost, WorkersLost])
def test_a_run_that_lost_what_it_needs_says_so_with_exit_1_and_goes_on_later(
    what: type[Lost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run = [0], InProcess.run

    def lost(self: InProcess, jobs: Jobs) -> Results:
        calls[0] += 1
        if calls[0] == 4:
            raise what("round 4: Ray was lost")
        return run(self, jobs)

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "run", lost)
        found = fedsim("run", Q, "--out", tmp_path / "run", "-q")
    assert found.code == 1 and found.err.count("\n") == 1
    assert "round 4: Ray was lost; start again, with --resume" in found.err
    assert fedsim("run", Q, "--out", tmp_path / "run", "-q", "--resume").code == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("s", "Returns.round returned a State; return (state, metrics)"),
        ("(s, None)", "Returns.round returned a pair; return (state, metrics)"),
        ("(s.x, {})", "Returns.round returned a Tensor; return a dataclass whose field x"),
        ("(s, {'colour': 'red'})", "Returns.round: metric 'colour' is no number but a str"),
        ("(s, {'colour': {'red': 1}})", "metric 'colour' is no number but a dict"),
        ("(s, {'colour': ['red']})", "metric 'colour' is no number but a list"),
        ("(s, {'colour': None})", "metric 'colour' is no number but a NoneType"),
    ],
)
def test_what_a_round_may_not_return_is_one_message(what: str, words: str, tmp_path: Path) -> None:
    found = fedsim("run", Q, f'strategy={{name: "cli_mine:Returns", what: "{what}"}}', "--out", tmp_path / "run")
    assert found.code == 2 and found.err.count("\n") == 1 and words in found.err, found


def test_metrics_may_be_tensors_and_arrays_and_are_kept_as_numbers(tmp_path: Path) -> None:
    values = "(s, {'a': torch.tensor(0.5), 'b': np.float32(1.5), 'c': torch.ones(2), 'd': True})"
    found = fedsim("run", Q, f'strategy={{name: "cli_mine:Returns", what: "{values}"}}', "--out", tmp_path / "run")
    assert found.code == 0, found
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (row["a"], row["b"], row["c"], row["d"]) == (0.5, 1.5, [1.0, 1.0], True)


@pytest.mark.parametrize(
    "name", ["round", "bits_up", "wall_seconds", "num_clients", "staleness_mean", "test_accuracy", "distance", "x"]
)
def test_a_metric_named_like_the_ledgers_is_refused_with_whose_it_is(name: str, tmp_path: Path) -> None:
    for who, owner in (("server", "Says"), ("client", "Says.work")):
        strategy = f"strategy={{name: 'cli_mine:Says', {who}: {name}}}"
        found = fedsim("run", "bare.yaml", strategy, "--out", tmp_path / who)
        assert found.code == 2 and found.err.count("\n") == 1, found
        assert f"{owner}: metric '{name}' is reserved" in found.err and "give it another name" in found.err


def test_every_name_that_fedsim_reports_is_reserved_and_no_other(tmp_path: Path) -> None:
    reported: set[str] = set()
    own, away = ("data.client_test=0.2", "evaluate.every=1"), ("clients.dropout.probability=0.1", "strategy.deadline=9")
    fedfix = "strategy={name: fedfix, interval: 0.1}"
    bernoulli = "clients.availability={name: bernoulli, p: 0.9}"
    for i, args in enumerate(((Q,), (D, *own), (D, *away, bernoulli), (Q, fedfix))):
        assert fedsim("run", *args, "--out", tmp_path / str(i), "-q").code == 0
        lines = (tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()
        reported |= {key for line in lines for key in json.loads(line)}
    evaluated = {key for key in reported if key.startswith(EVALUATED)}
    assert {key.partition("_")[0] + "_" for key in evaluated} == set(EVALUATED)
    assert reported - evaluated - RESERVED == {"train_loss"}
    assert RESERVED - reported == {"nonfinite", "num_failed", "num_refused"}  # the last two are of real devices


def test_a_state_without_a_model_is_refused(tmp_path: Path) -> None:
    found = fedsim("run", Q, "strategy=cli_mine:NoModel", "--out", tmp_path / "run")
    assert found.code == 2 and "NoModel.init returned a dict" in found.err


def test_a_run_ends_with_a_table_and_the_place_of_its_report(tmp_path: Path) -> None:
    found = fedsim("run", D, "--out", tmp_path / "a[1]")
    assert found.code == 0 and found.err == ""
    assert "Test accuracy" in found.out and f"report: {tmp_path / 'a[1]' / 'report.html'}" in found.out
    assert "10, 2 of them in a round" in found.out


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    assert fedsim("run", Q, "--out", tmp_path / "run", "--quiet") == Outcome(0, "", "")


def test_runs_are_numbered_and_resume_takes_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quad.yaml").write_text(QUAD)
    monkeypatch.chdir(tmp_path)
    assert fedsim("run", Q, "-q").code == 0 and fedsim("run", Q, "-q", "seed=1").code == 0
    first = contents(tmp_path / "runs" / "quad-001")
    assert fedsim("run", Q, "-q", "--resume", "seed=1", "rounds=6").code == 0
    assert contents(tmp_path / "runs" / "quad-001") == first
    assert len((tmp_path / "runs" / "quad-002" / "metrics.jsonl").read_text().splitlines()) == 6


def test_check_prints_the_plan_and_writes_nothing(folder: Path) -> None:
    before = contents(folder)
    found = fedsim("check", D)
    assert found.code == 0
    for word in ("10, 2 of them in a round", "samples per client", "650 parameters", "a stack", "MiB", "Mbit down"):
        assert word in found.out, found.out
    assert contents(folder) == before


@pytest.mark.parametrize("table", TABLES)
def test_list_gives_every_entry_of_every_table_a_line(table: str) -> None:
    found = fedsim("list", table)
    assert found.code == 0 and found.out.splitlines()[0].strip() == table
    for name, entry in TABLES[table].items():
        line = one_line(entry)
        assert len(line.split()) >= 4, (name, line)
        assert f"\n{name} " in found.out
        first_words = " ".join(line.split()[:4])
        assert first_words in " ".join(found.out.split()), (name, line)
    own = [one_line(entry) for entry in TABLES[table].values()]
    assert len(set(own)) >= 0.7 * len(own), "entries need lines of their own"


def test_list_without_a_table_shows_all() -> None:
    found = fedsim("list")
    assert found.code == 0 and all(f"\n{table}" in "\n" + found.out for table in TABLES)


def test_brackets_of_a_description_are_shown() -> None:
    assert "[200]" in fedsim("list", "models").out


def test_compare_fits_in_100_columns_and_writes_a_page(tmp_path: Path) -> None:
    for name, lr in (("slow", 0.01), ("fast", 0.2)):
        assert fedsim("run", Q, f"local.optimizer.lr={lr}", "--out", tmp_path / name, "-q").code == 0
    found = fedsim("compare", tmp_path / "slow", tmp_path / "fast", "--out", tmp_path / "both.html")
    assert found.code == 0
    lines = found.out.splitlines()
    assert max(map(len, lines[:-1])) <= 100 and "slow" in found.out and "fast" in found.out
    assert "local.optimizer.lr=0.2" in found.out and "the best that every run reached" in found.out
    assert lines[-1] == f"wrote {tmp_path / 'both.html'}" and (tmp_path / "both.html").stat().st_size > 5000


def test_report_is_written_again(tmp_path: Path) -> None:
    assert fedsim("run", Q, "--out", tmp_path / "run", "-q").code == 0
    (tmp_path / "run" / "report.html").unlink()
    found = fedsim("report", tmp_path / "run")
    assert found.out == f"report: {tmp_path / 'run' / 'report.html'}\n"
    assert "</html>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.filterwarnings("always:.*not batched")
def test_a_warning_is_one_line() -> None:
    found = fedsim("check", Q, "local.optimizer.name=torch.optim:SGD")
    reason = "torch.optim:SGD is not batched, clients step one after the other"
    assert found.code == 0 and found.err == f"fedsim: warning: local.optimizer: {reason}\n"


def test_ctrl_c_while_starting_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Impatient:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "fedsim.runs":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fedsim.runs")
    monkeypatch.delattr("fedsim.runs", raising=False)
    monkeypatch.setattr(sys, "argv", ["fedsim", "run", Q])
    monkeypatch.setattr(sys, "meta_path", [Impatient(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "fedsim: stopped while starting; nothing was written\n"
