"""A small strategy and its jobs, for tests of executors; workers import it, so it knows nothing of pytest."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.sim.collectives import Group
from fedsim.sim.executor import Jobs, Results, StackRunner
from fedsim.sim.ray_worker import Actor
from fedsim.streams import Streams
from fedsim.task import Schedule
from fedsim.tasks.quadratic import QuadraticTask

NUM_CLIENTS, DIM, VICTIM = 150, 33, 7


class LocalError(Exception):
    """An exception that cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("not this one")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One noisy step with a control variate.

    Args:
        folder: where the victim, client 7, looks for a file `armed`; it renames it to `mark`, writes its process id
            there and hangs. So it hangs once each time the file is put there.
    """

    folder: str = ""

    def step(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        self._hang_once(clients)
        x = x.expand(len(clients), -1)
        g, loss = clients.task.field(
            x, clients.task.batches(clients.ids, clients.streams, Schedule(steps=1, epochs=None))[0]
        )
        c = clients.memory["c"]
        clients.memory["c"] = 0.5 * c + g
        clients.log(loss=loss)
        return {"delta": 0.1 * (g - c), "length": torch.linalg.vector_norm(g, dim=1)}

    def fail(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        if VICTIM in clients.ids.tolist():
            raise ZeroDivisionError("client seven divides by nothing")
        return self.step(clients, x)

    def fail_oddly(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        raise LocalError("cannot be sent")

    def _hang_once(self, clients: Cohort) -> None:
        if not self.folder or VICTIM not in clients.ids.tolist():
            return
        mark = Path(self.folder) / "mark"
        try:
            mark.with_name("armed").rename(mark)
        except FileNotFoundError:
            return
        mark.write_text(f"{os.getpid()}\n")
        time.sleep(120)


def arm(folder: Path) -> Path:
    """Make the victim hang once more; the file in which it will leave its process id."""
    (folder / "mark").unlink(missing_ok=True)
    (folder / "armed").touch()
    return folder / "mark"


def once_marked(mark: Path, act: Callable[[int], None]) -> threading.Thread:
    """A running thread that calls `act(pid)` as soon as the victim hangs."""

    def watch() -> None:
        while not (mark.exists() and mark.read_text().endswith("\n")):
            time.sleep(0.02)
        act(int(mark.read_text()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def hang_after_a_stack(actor: Actor, mark: str) -> None:
    """Called in a worker: its next stack is run to the end, then it leaves its process id and hangs before replying."""
    run = StackRunner.run

    def never_heard_of(self: StackRunner, jobs: Jobs) -> Results:
        run(self, jobs)
        Path(mark).write_text(f"{os.getpid()}\n")
        time.sleep(120)
        raise AssertionError("nobody ended this worker")

    StackRunner.run = never_heard_of  # type: ignore[method-assign]


def die_in(where: str) -> None:
    """Let this process be killed when its group of workers comes to this part of a call."""

    def die(self: Group, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(Group, where, die)


def worker_dies_in(actor: Actor, where: str) -> None:
    """Called in a worker."""
    die_in(where)


def worker_dies_in_pieces(actor: Actor) -> None:
    """Called in a worker: it is killed when it is next given pieces of a task's own work."""

    def die(self: QuadraticTask, x: Tensor, pool: Any) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    QuadraticTask.evaluate_clients = die  # type: ignore[method-assign]


def runner(folder: Path | str = "") -> StackRunner:
    """The toy on noisy quadratics whose clients differ in weight."""
    task = QuadraticTask.drawn(NUM_CLIENTS, DIM, seed=3, spread=5.0, noise=0.3)
    counts = torch.arange(NUM_CLIENTS) * 7 % 23 + 1
    task = QuadraticTask(task.a, task.b, task.x0, task.noise, counts)
    return StackRunner(task, Toy(folder=str(folder)), seed=11, device=torch.device("cpu"))


def some_jobs(work: str = "step", *, fold: bool = True, num_models: int = 1, round: int = 4) -> Jobs:
    """Two thirds of the clients, in mixed order, from one or several models, with rows that they kept."""
    key = Streams(5, torch.arange(NUM_CLIENTS), torch.zeros(NUM_CLIENTS, dtype=torch.int64))
    ids = torch.randperm(NUM_CLIENTS, generator=torch.Generator().manual_seed(1))[:100]
    assert VICTIM in ids
    models: list[Mapping[str, Any]] = [{"x": key.normal(f"model {m}", DIM)[m]} for m in range(num_models)]
    kept = {"c": key.normal("kept", DIM)[ids]}
    weights = key.uniform("weights")[ids].flatten() if fold else None
    return Jobs(work, ids, ids % 5, models, torch.arange(100) % num_models, kept, weights, round)


def assert_same_bits(a: Results, b: Results) -> None:
    """Every tensor of the two has the same entries, to the last bit."""
    assert torch.equal(a.bits_up, b.bits_up)
    for part in ("fields", "sums", "memory", "metrics"):
        left, right = getattr(a, part), getattr(b, part)
        assert left.keys() == right.keys(), part
        for name in left:
            assert left[name].dtype == right[name].dtype
            assert torch.equal(left[name], right[name]), f"{part}[{name}]"
