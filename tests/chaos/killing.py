"""Runs in processes that can be killed, and what to kill in them, drawn by a seed."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from numpy.random import Generator, default_rng

import fedsim
from fedsim import results
from fedsim.strategies import STRATEGIES
from tests.composition import pair

SEED = int(os.environ.get("CHAOS_SEED", "0"))
ROUNDS = 10
SECONDS = 300.0  # in which a run must end, on a busy machine too

RAY = {
    "worker": "ray::Actor",
    "raylet": "/raylet/raylet",
    "dashboard agent": "ray::DashboardAgent",
    "runtime agent": "ray::RuntimeEnvAgent",
    "Ray's process": "fedsim.sim.ray_process",
}
"""What a victim's command line holds."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL in a run on Ray.

    Args:
        victim: "driver", or a key of `RAY`.
        at: rounds that are done by then.
        delay: seconds later.
    """

    victim: str
    at: int
    delay: float


def generator(*place: int) -> Generator:
    """What draws a case: it depends on nothing but the seed and the case's place."""
    return default_rng([SEED, *place])


def drawn_strategy(case: int) -> str:
    """Strategies in an order of the seed's own, each as often as any other."""
    names = sorted(STRATEGIES)
    return names[generator(0).permutation(len(names))[case % len(names)]]


def config(strategy: str, case: int, ray: bool) -> dict[str, Any]:
    """A short run of a strategy."""
    every = int(generator(1, case).integers(1, 4))
    runtime = {"stack": 3, "workers": 1, "memory": ["ram", "disk"][every % 2]}
    if ray:
        runtime |= {"executor": "ray", "workers": 2, "collectives": ["object_store", "gloo"][case % 2]}
    return {**pair(strategy, None), "rounds": ROUNDS, "checkpoint": {"every": every}, "runtime": runtime}


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["fedsim.runs", "fedsim.compose", "tests.chaos.killing"])  # a run starts at once


def _play(raw: dict[str, Any], folder: Path, said: Path) -> None:
    """In a process of its own: a run from its start, or from where it was killed."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    fedsim.run(raw, out=folder, resume=results.holds_run(folder))


class Play:
    """A run in a process of its own.

    Args:
        raw: the experiment.
        folder: of the run; a file beside it takes what it says.
    """

    def __init__(self, raw: dict[str, Any], folder: Path) -> None:
        self.folder, self.said = folder, folder.with_suffix(".txt")
        self._arguments = raw, folder, self.said
        self._seen: list[psutil.Process] = []
        self._process = self._start()

    def _start(self) -> BaseProcess:
        process = _processes.Process(target=_play, args=self._arguments)
        process.start()
        return process

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def rounds(self) -> int:
        """Rows that are written."""
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def until(self, rounds: int) -> None:
        """Wait until so many rounds are done, or the run has ended."""
        end = time.monotonic() + SECONDS
        while self.running and self.rounds() < rounds:
            assert time.monotonic() < end, (self.rounds(), self.said.read_text())
            time.sleep(0.002)

    def kill(self, victim: str, rng: Generator) -> bool:
        """Kill one of those that are such; a driver that was killed goes on. False if there was none."""
        family = self._family()
        if victim == "driver":
            self._process.kill()
            self._process.join()
            killed = self._process.exitcode == -9
            self._process = self._start()
            return killed
        found = [p for p in family if RAY[victim] in _command(p)]
        if not found:
            return False
        try:
            found[rng.integers(len(found))].kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def finish(self) -> None:
        """Wait for the end; nothing that it started may be left."""
        self._family()
        self._process.join(SECONDS)
        assert self._process.exitcode == 0, (self._process.exitcode, self.said.read_text())
        left = [p for p in psutil.wait_procs(self._seen, timeout=30)[1] if _runs(p)]
        assert not left, left

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.join()

    def _family(self) -> list[psutil.Process]:
        """What the run has started, and all that has been seen of it."""
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._seen += [p for p in family if p not in self._seen]
        return family


def _runs(process: psutil.Process) -> bool:
    """Whether it is more than an entry that nobody has collected, which in a container may stay."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:4])
    except psutil.Error:
        return ""  # it has ended meanwhile


@cache
def undisturbed(strategy: str, case: int, folder: Path) -> tuple[Path, float]:
    """The run folder of an undisturbed run in process, and the seconds that it took."""
    start = time.monotonic()
    play = Play(config(strategy, case, ray=False), folder / f"{case}-whole")
    play.finish()
    return play.folder, time.monotonic() - start
