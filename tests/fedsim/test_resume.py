"""One run to a folder, and going on from whatever a crash, a kill, bad luck or a second run left there."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedsim
from fedsim import checkpoint, files, results
from fedsim.config import ConfigError
from fedsim.files import held, write_tensors, write_whole
from tests.build import rows_in
from tests.fedsim.console import contents
from tests.fedsim.console import fedsim as console
from tests.fedsim.test_runs import QUADRATIC, QUICKSTART, ROOT, model, start, wait_for_rows

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never touched: 20 rounds, checkpoints after 18 and 20."""
    folder = tmp_path_factory.mktemp("resume") / "whole"
    fedsim.run(QUADRATIC, out=folder)
    return folder


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    folder = tmp_path / "run"
    for name, content in contents(whole).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


# One run to a folder ----------------------------------------------------------------------------------------------

TOGETHER = """
import json, os, time
from pathlib import Path
import fedsim.runs, fedsim.report, fedsim.loop
from tests.fedsim.console import fedsim
for number, more in enumerate(([], ["--out", "mine"])):
    Path(f"ready-{number}-{os.getpid()}").touch()
    while len(list(Path().glob(f"ready-{number}-*"))) < 2:
        time.sleep(0.001)
    found = fedsim("run", "quad.yaml", "-q", *more)
    print(json.dumps([found.code, found.err]))
"""


@pytest.mark.timeout(300)
def test_two_runs_that_start_at_once_get_a_folder_each_and_of_two_into_one_folder_one_gets_it(
    tmp_path: Path, whole: Path
) -> None:
    (tmp_path / "quad.yaml").write_text(json.dumps(QUADRATIC))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT, "cwd": tmp_path}
    processes = [subprocess.Popen([sys.executable, "-c", TOGETHER], **pipes) for _ in range(2)]
    outs = [process.communicate(timeout=200)[0].splitlines() for process in processes]
    apart, into_one = (sorted(json.loads(out[call]) for out in outs) for call in (0, 1))
    assert apart == [[0, ""]] * 2
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["quad-001", "quad-002"]
    assert [code for code, _ in into_one] == [0, 2]
    for folder in (*(tmp_path / "runs").iterdir(), tmp_path / "mine"):
        assert rows_in(folder) == rows_in(whole)
    for _, error in into_one[1:]:  # by "another process" where its holder has not yet had the time to write who it is
        assert error.count("\n") == 1 and ("mine is in use by" in error or "already holds a run" in error)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_with_its_holder_and_left_alone(resume: bool, tmp_path: Path, done: Path) -> None:
    folder = done if resume else tmp_path / "new"
    folder.mkdir(exist_ok=True)
    with held(folder):
        before = contents(folder)
        holder = rf"in use by process {os.getpid()} on {platform.node()} since \d{{4}}-\d\d-\d\d .*choose another --out"
        with pytest.raises(ConfigError, match=holder):
            fedsim.run(QUADRATIC, out=folder, resume=resume, rounds=30)
        assert contents(folder) == before
    fedsim.run(QUADRATIC, out=folder, resume=resume, rounds=30)
    assert len(rows_in(folder)) == 30


@pytest.mark.timeout(300)
def test_a_live_run_is_not_resumed_until_sigterm_saved_it_with_exit_143(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("evaluate.every=2", "checkpoint.every=null", "log.sinks=[jsonl]")
    process = start(folder, *more)
    wait_for_rows(folder, process, 6)
    found = console("run", QUICKSTART, "rounds=100000", *more, "--out", folder, "--resume")
    assert found.code == 2 and f"in use by process {process.pid} on" in found.err and found.err.count("\n") == 1
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    last = len(rows_in(folder))
    assert process.returncode == 143 and err == f"fedsim: stopped after round {last}; add --resume to go on\n"
    assert console("run", QUICKSTART, f"rounds={last + 1}", *more, "--out", folder, "--resume", "-q").code == 0
    assert [row["round"] for row in rows_in(folder)] == list(range(1, last + 2))


def test_numbers_go_on_past_999_and_folders_without_a_run_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "quad-999").mkdir(parents=True)
    for number in ("007", "1000"):
        fedsim.run(QUADRATIC, out=tmp_path / f"quad-{number}", rounds=1)
    (tmp_path / "quad-1001").mkdir()  # killed before it wrote anything
    (tmp_path / "quad-old").mkdir()
    assert results.last_folder(tmp_path / "quad") == tmp_path / "quad-1000"
    with pytest.raises(ConfigError, match=r"holds no run of other; leave out --resume"):
        results.last_folder(tmp_path / "other")


# What is missing or damaged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["env.json", "config.yaml", "summary.json", "model.safetensors", "report.html"])
def test_what_is_missing_is_made_again(name: str, done: Path, whole: Path) -> None:
    (done / name).unlink()
    fedsim.run(QUADRATIC, out=done, resume=True)
    if name != "report.html":  # which shows the wall time
        known = {k: v for k, v in contents(done).items() if k == name and k != "summary.json"}
        assert all(content == (whole / name).read_bytes() for content in known.values())
    assert (done / name).stat().st_size > 0 and rows_in(done) == rows_in(whole)


@pytest.mark.parametrize("broken", ["part", "missing"])
def test_a_kill_while_the_split_was_written_leaves_a_run_to_resume(broken: str, tmp_path: Path) -> None:
    short = {"rounds": 2, "local.epochs": 1, "log.sinks": ["jsonl"]}
    fedsim.run(QUICKSTART, out=tmp_path, **short)
    split = (tmp_path / "split.npz").read_bytes()
    (tmp_path / "split.npz").unlink()
    if broken == "part":
        (tmp_path / "split.npz.part").write_bytes(split[:100])
        (tmp_path / "devices.jsonl.part").touch()  # of a deployment
    fedsim.run(QUICKSTART, out=tmp_path, resume=True, **short)
    assert (tmp_path / "split.npz").read_bytes() == split and not list(tmp_path.glob("*.part"))


@pytest.mark.pictures
@pytest.mark.filterwarnings("default")
def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    def fail(folder: Path) -> None:
        raise ZeroDivisionError("a picture")

    monkeypatch.setattr("fedsim.report.write_report", fail)
    (tmp_path / "quad.yaml").write_text(json.dumps(QUADRATIC))
    found = console("run", tmp_path / "quad.yaml", "--out", tmp_path / "run", "-q")
    message = f"the run is complete, but not its report (ZeroDivisionError: a picture); `fedsim report {tmp_path}/run`"
    assert found.code == 0 and found.err.count("\n") == 1 and message in found.err
    assert rows_in(tmp_path / "run") == rows_in(whole) and model(tmp_path / "run") == model(whole)


def lose(done: Path, change: Callable[[list[str]], list[str]]) -> None:
    file = done / "metrics.jsonl"
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        (lambda lines: lines[:18], 19),
        (lambda lines: [*lines[:19], lines[19][:30]], 20),
        (lambda lines: [*lines[:18], lines[19]], 19),
        (lambda lines: [*lines[:19], lines[18], lines[19]], 20),
        (lambda lines: [*lines[:18], "{\n", *lines[19:]], 19),
    ],
    ids=["lost", "half", "one lost", "doubled", "garbled"],
)
def test_rows_that_are_not_there_are_computed_again_from_further_back(
    change: Callable[[list[str]], list[str]], lacks: int, done: Path, whole: Path
) -> None:
    lose(done, change)
    words = rf"round-000020: metrics.jsonl lacks row {lacks} or holds it twice; going on from round 18 instead"
    with pytest.warns(UserWarning, match=words):
        fedsim.run(QUADRATIC, out=done, resume=True)
    assert rows_in(done) == rows_in(whole) and model(done) == model(whole)


def test_rows_lost_before_every_checkpoint_are_refused_and_nothing_is_touched(done: Path) -> None:
    lose(done, lambda lines: lines[:3] + lines[4:])
    before = contents(done)
    with pytest.raises(ConfigError, match=r"round-000020: .*lacks row 4 .*round-000018: .*; there is no other"):
        fedsim.run(QUADRATIC, out=done, resume=True)
    assert contents(done) == before


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", "SHA256SUMS"])
@pytest.mark.parametrize("at", [0, 40, -1])
def test_after_a_flipped_bit_the_checkpoint_before_serves(file: str, at: int, done: Path, whole: Path) -> None:
    flip(done / "checkpoints" / "round-000020" / file, at)
    with pytest.warns(UserWarning, match="round-000020: can't be read .*SHA256SUMS.*; going on from round 18 instead"):
        fedsim.run(QUADRATIC, out=done, resume=True)
    assert rows_in(done) == rows_in(whole) and model(done) == model(whole)
    checkpoint.load(done / "checkpoints" / "round-000020")


def test_a_run_that_was_killed_before_its_first_checkpoint_is_gone_on_with_by_its_own_config_alone(
    done: Path, whole: Path
) -> None:
    shutil.rmtree(done / "checkpoints")
    before = contents(done)
    with pytest.raises(ConfigError, match=r"config.yaml: belongs to another config \(seed, strategy differ\)"):
        fedsim.run({**QUADRATIC, "seed": 9, "strategy": "scaffold"}, out=done, resume=True)
    assert contents(done) == before
    fedsim.run(QUADRATIC, out=done, resume=True)
    assert rows_in(done) == rows_in(whole)


def test_without_a_sound_checkpoint_there_is_one_message_and_nothing_is_touched(done: Path) -> None:
    for path in checkpoint.checkpoints(done / "checkpoints"):
        flip(path / "tensors.safetensors", -1)
    before = contents(done)
    with pytest.raises(ConfigError, match=r"round-000020: .*; round-000018: .*; there is no other"):
        fedsim.run(QUADRATIC, out=done, resume=True)
    assert contents(done) == before


def test_a_vector_of_another_length_is_not_gone_on_from(done: Path, whole: Path) -> None:
    path = done / "checkpoints" / "round-000020"
    saved = checkpoint.load(path)
    tensors = {k: v[:4] if v.shape == (6,) else v for k, v in saved.aside.tensors.items()}
    checkpoint.save_file(tensors, path / "tensors.safetensors")
    (path / "SHA256SUMS").write_bytes(subprocess.check_output(["sha256sum", *checkpoint.FILES], cwd=path))
    with pytest.warns(UserWarning, match=r"round-000020: state.x is \[4\] .* where the run has \[6\] .*from round 18"):
        fedsim.run(QUADRATIC, out=done, resume=True)
    assert rows_in(done) == rows_in(whole)


def test_rows_reach_the_disk_before_the_checkpoint_that_knows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(number: int) -> None:
        file = Path(os.readlink(f"/proc/self/fd/{number}"))
        count = len(file.read_bytes().splitlines()) if file.name == "metrics.jsonl" else 0
        seen.append(f"{file.name} {count}")
        fsync(number)

    def renamed(a: Path, b: Path) -> None:
        seen.append(b.name)
        replace(a, b)

    monkeypatch.setattr(files.os, "fsync", noted)
    monkeypatch.setattr(checkpoint.os, "replace", renamed)
    fedsim.run(QUADRATIC, out=tmp_path / "run")
    for number in (6, 12, 18, 20):
        final = seen.index(f"round-{number:06d}")
        assert "state.json 0" in seen[seen.index(f"metrics.jsonl {number}") : final]
        assert sorted(seen[final - 3 : final]) == ["SHA256SUMS 0", "state.json 0", "tensors.safetensors 0"]
        assert seen[final + 1] == "checkpoints 0"


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")

    def fail(*args: Any) -> None:
        assert (tmp_path / "file.part").exists()
        raise OSError("full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, fail)
            with pytest.raises(OSError, match="full"):
                write_whole(file, "new")
        assert contents(tmp_path) == {"file": b"old"}
    write_whole(file, b"new")
    assert contents(tmp_path) == {"file": b"new"}


def test_tensors_that_do_not_fit_on_the_disk_are_an_oserror_and_leave_the_file_that_was_there(tmp_path: Path) -> None:
    path, rows = tmp_path / "model.safetensors", torch.arange(40_000.0).view(2, -1)
    write_tensors(path, {"a": rows[0], "b": rows[1]})  # one storage
    before = path.read_bytes()
    assert torch.equal(load_file(path)["b"], rows[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors.part: "):
            write_tensors(path, {"a": rows + 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
