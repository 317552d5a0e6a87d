"""Fleets put together from their pieces, and rounds played by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsim.clients.local_training import LocalTraining
from fedsim.cohort import Cohort
from fedsim.compose import compose
from fedsim.compress.sender import Sender
from fedsim.data.federated import FederatedData
from fedsim.data.images import digits
from fedsim.engine import build_engine
from fedsim.engine.losses import LOSSES
from fedsim.experiment import Experiment
from fedsim.graph import Inbox
from fedsim.loop import Run
from fedsim.memory import Memory, MemoryRows
from fedsim.optim import build as build_optimizer
from fedsim.params import Layout
from fedsim.prox import Prox
from fedsim.sim.absence import Absence
from fedsim.sim.byzantine import Byzantine
from fedsim.sim.devices import Constant, Devices
from fedsim.sim.executor import Executor, Jobs, Results, StackRunner
from fedsim.sim.fleet import PRESENT, SimFleet
from fedsim.sim.in_process import InProcess
from fedsim.sim.links import Downlink, Uplink
from fedsim.strategy import step
from fedsim.streams import Streams, server_rng
from fedsim.task import Schedule, Task
from fedsim.tasks.bilinear import BilinearTask
from fedsim.tasks.formula import FormulaBatch
from fedsim.tasks.metrics import METRICS
from fedsim.tasks.models import Factory, init_parameters
from fedsim.tasks.quadratic import QuadraticTask
from fedsim.tasks.supervised import SupervisedTask

T = TypeVar("T", bound=Task)


def train(experiment: Experiment, **options: Any) -> tuple[Any, list[dict[str, Any]], str]:
    """Run an experiment to its end: (final state, rows of this call, why it ended); options as for `Run`."""
    with Run(experiment, **options) as run:
        rows = list(run.rounds())
    assert run.ended is not None
    return run.state, rows, run.ended


def quadratic(a: Any, b: Any, x0: Any, noise: float = 0.0, num_examples: list[int] | None = None) -> QuadraticTask:
    """A quadratic task in float64."""
    tensors = [torch.as_tensor(v, dtype=torch.float64) for v in (a, b, x0)]
    start = tensors[2].reshape(1) if tensors[2].ndim == 0 else tensors[2]
    counts = None if num_examples is None else torch.tensor(num_examples)
    return QuadraticTask(tensors[0], tensors[1], start, noise, counts)


def two_clients() -> QuadraticTask:
    """f_1 = x^2 / 2 and f_2 = 3/2 (x - 1)^2 from x = 2; their mean is least at 0.75."""
    return quadratic([1, 3], [0, 1], 2)


def drawn(clients: int, dim: int, seed: int = 0, noise: float = 0.0) -> QuadraticTask:
    """Random quadratics in float64."""
    task = QuadraticTask.drawn(clients, dim, seed)
    return QuadraticTask(task.a.double(), task.b.double(), torch.ones(dim, dtype=torch.float64), noise)


def saddle(
    clients: int, dim: int, seed: int = 0, lam: float = 0.0, low: float = 0.5, prox: Prox | None = None
) -> BilinearTask:
    """A random bilinear saddle point in float64, singular values from `low` to 2."""
    task = BilinearTask.drawn(clients, dim, seed, lam=lam, low=low)
    return BilinearTask(task.matrix.double(), task.a.double(), task.b.double(), lam, prox=prox)


def local_sgd(
    task: Task, lr: float = 0.1, rounds: int = 1, optimizer: dict[str, Any] | None = None, **schedule: Any
) -> LocalTraining:
    """Local training; ten steps of SGD on the whole data unless told otherwise."""
    schedule = {"epochs": None, "steps": 10, "batch_size": None} | schedule
    rule = build_optimizer(optimizer or {"name": "sgd", "lr": lr}, task.layout)
    return LocalTraining(optimizer=rule, schedule=Schedule(**schedule), rounds=rounds)


Rows = list[dict[str, Any]]


def without_wall_time(rows: Iterable[Mapping[str, Any]]) -> Rows:
    """What must not differ between two runs of one experiment."""
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def rows_in(folder: Path) -> Rows:
    """metrics.jsonl without wall time."""
    return without_wall_time(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def rows_of(config: Mapping[str, Any], folder: Path | None = None, resume: bool = False) -> Rows:
    """The rows of a run without wall time."""
    composition = compose(config, "config")
    try:
        sinks = [] if folder is None else composition.sinks
        _, rows, _ = train(composition.experiment, sinks=sinks, folder=folder, resume=resume)
    finally:
        composition.close()
    return without_wall_time(rows)


def streams(clients: int | list[int] | Tensor, job: int = 0, seed: int = 5) -> Streams:
    """Streams of one job of so many clients, or of these."""
    ids = torch.arange(clients) if isinstance(clients, int) else torch.as_tensor(clients)
    return Streams(seed, ids, torch.full_like(ids, job))


def sender(streams: Streams, step: int = 0, memory: MemoryRows | None = None) -> Sender:
    """Who sends packets with these streams, and keeps nothing unless given where."""
    rows = len(streams.clients)
    return Sender(streams, memory or MemoryRows({}, rows, 0, torch.device("cpu")), "sent", step)


def formula_batch(rows: list[int], job: int = 0, step: int = 0) -> FormulaBatch:
    """A step of these clients on a task that is a formula."""
    return FormulaBatch(torch.tensor(rows), streams(rows, job, seed=0), step)


def cohort(
    task: Task, ids: list[int], jobs: list[int] | None = None, rounds: list[int] | None = None, device: str = "cpu"
) -> Cohort:
    """A cohort of these clients, who remember nothing; their first jobs, in round 0, unless told otherwise."""
    clients, none, there = torch.tensor(ids), [0] * len(ids), torch.device(device)
    return Cohort(
        ids=clients,
        task=task,
        memory=MemoryRows({}, len(ids), task.layout.size, there),
        streams=Streams(0, clients.to(there), torch.tensor(jobs or none).to(there)),
        device=there,
        rounds=torch.tensor(rounds or none),
    )


class Counted:
    """An executor that notes how many clients each call ran."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.calls: list[int] = []

    def run(self, jobs: Jobs) -> Results:
        self.calls.append(len(jobs.ids))
        return self.inner.run(jobs)

    def close(self) -> None:
        self.inner.close()


def build_fleet(
    task: Task,
    strategy: Any,
    *,
    seed: int = 0,
    width: int = 64,
    workers: int = 1,
    ahead: int = 64,
    devices: Devices | None = None,
    uplink: Uplink | None = None,
    downlink: Downlink | None = None,
    byzantine: Byzantine | None = None,
    reply_bits: int | None = None,
    absence: Absence = PRESENT,
    executor: Callable[..., Executor] = InProcess,
) -> SimFleet:
    """A simulated fleet whose clients run the strategy's halves by an executor."""
    runner = StackRunner(task, strategy, seed, torch.device("cpu"), uplink)
    return SimFleet(
        num_examples=task.num_examples,
        model_size=task.layout.size,
        executor=Counted(executor(runner, width=width, workers=workers)),
        devices=devices or Constant(seconds_per_step=0.01),
        memory=Memory(len(task.num_examples)),
        seed=seed,
        ahead=ahead,
        reply_bits=reply_bits if uplink is None else uplink.compressor.bits(task.layout.size),
        downlink=downlink,
        byzantine=byzantine,
        absence=absence,
    )


@dataclass
class Play:
    """Rounds of a strategy, one after the other, as the loop plays them."""

    strategy: Any
    fleet: SimFleet
    state: Any
    seed: int = 0
    round: int = 0
    seen: Mapping[str, Any] = field(default_factory=dict)  # what clients logged in the last round

    @classmethod
    def start(cls, task: Task, strategy: Any, *, x0: Tensor | None = None, seed: int = 0, **fleet: Any) -> Play:
        x0 = task.init(seed) if x0 is None else x0
        return cls(strategy, build_fleet(task, strategy, seed=seed, **fleet), strategy.init(x0), seed)

    def step(self) -> dict[str, Any]:
        rng = server_rng(self.seed, "server", self.round)
        self.state, own = step(self.strategy, self.state, self.fleet, rng)
        self.round += 1
        self.seen = self.fleet.end_round().values()
        return own

    def path(self, rounds: int, of: Callable[[Any], Tensor] = lambda state: state.x) -> Tensor:
        """[rounds, P]: the server's model after each of the next rounds."""
        out = []
        for _ in range(rounds):
            self.step()
            out.append(of(self.state).clone())
        return torch.stack(out)


def play(task: Task, strategy: Any, rounds: int, **options: Any) -> Tensor:
    """[rounds, P]: the server's model after every round of a fresh run."""
    return Play.start(task, strategy, **options).path(rounds)


def heard_sum(inbox: Inbox, name: str) -> Tensor:
    """[C, P]: the plain sum of what each client heard."""
    return replace(inbox.heard, weights=torch.ones_like(inbox.heard.weights)).mix(inbox[name])


def watched(task: QuadraticTask) -> list[tuple[int, int, int]]:
    """Every (client, job, step) whose gradient the task will be asked for: the key of its minibatch."""
    seen: list[tuple[int, int, int]] = []
    inner = task.field

    def field(x: Tensor, batch: FormulaBatch) -> tuple[Tensor, Tensor]:
        seen.extend((i, j, batch.step) for i, j in zip(batch.rows.tolist(), batch.streams.jobs.tolist(), strict=True))
        return inner(x, batch)

    task.field = field  # type: ignore[method-assign]
    return seen


@dataclass(frozen=True)
class Clocks:
    """Every client's jobs take a time given by hand; nothing for those without steps, and links on top."""

    tau: tuple[float, ...]
    downlink: float = inf
    uplink: float = inf
    random: bool = False

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        work = torch.tensor(self.tau, dtype=torch.float64)[streams.clients]
        return bits_down / self.downlink + torch.where(steps > 0, work, 0.0) + bits_up / self.uplink


def f_80(clients: int = 5) -> tuple[float, ...]:
    """F-80 clocks: 1, 0.8, 0.6, 0.4, 0.2 for five clients."""
    return tuple(1 - 0.8 * i / (clients - 1) for i in range(clients))


def digits_task(model: Factory, counts: list[int], engine: str = "stacked") -> SupervisedTask:
    """Handwritten digits, so many to each client."""
    source = digits()
    data = FederatedData(
        inputs=source.inputs,
        targets=source.targets,
        offsets=torch.tensor([0, *counts]).cumsum(0),
        order=torch.arange(sum(counts)),
        test_inputs=source.inputs[-50:],
        test_targets=source.targets[-50:],
        num_classes=10,
    )
    module, x0 = init_parameters(lambda: model((1, 8, 8), 10), 0)
    loss = LOSSES["cross_entropy"]
    built = build_engine(engine, module, Layout.of_module(module), loss, torch.device("cpu"))
    return SupervisedTask(data, module, x0, built, loss, metrics={"accuracy": METRICS["accuracy"]})


@contextmanager
def task_and_pool(raw: Mapping[str, Any], kind: type[T]) -> Iterator[tuple[T, Any]]:
    """(the task of an experiment, which is of this kind; a pool to evaluate on)."""
    composition = compose(raw, "x.yaml")
    try:
        assert isinstance(composition.experiment.task, kind)
        yield composition.experiment.task, composition.executor
    finally:
        composition.close()
