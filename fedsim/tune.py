"""Measuring engines, stack widths and workers on this machine: what `fedsim tune` prints.

The rule behind `auto` never measures, because a run's bits depend on engine and width and would then depend on what
else the machine did. Here local training of the run's own first cohort is timed for each candidate, and the keys to
set are printed; whoever sets them has chosen the bits.

Letters: R clients of a cohort, K local steps.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.compose import Composition, compose
from fedsim.compose.problems import task_of
from fedsim.config import ConfigError
from fedsim.engine import Plan
from fedsim.engine.choose import graphed
from fedsim.engine.native import suits
from fedsim.fleet import choose
from fedsim.sim.executor import ClientError, Jobs, StackRunner
from fedsim.sim.in_process import InProcess
from fedsim.strategy import fields_of
from fedsim.streams import server_rng

SECONDS = 0.5  # that one measured call should take
REPEATS = 3
MAX_COHORT = 512
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Candidate:
    """A way to compute the clients, as the keys of `runtime` name it."""

    engine: str
    stack: int
    workers: int
    native: bool = False

    def __str__(self) -> str:
        native = str(self.native).lower()
        return f"{self.engine:<10}{native:<8}{self.stack:>6}{self.workers:>9}"


@dataclass(frozen=True)
class LocalWork:
    """A strategy that is nothing but local training."""

    local: LocalTraining

    def train(self, clients: Cohort, x: Tensor) -> Reply:
        return {"delta": self.local(clients, x).delta}


class Bench:
    """Times local training of one cohort.

    Args:
        composition: the run.

    Raises:
        ConfigError: if there is nothing to choose in this run.
    """

    def __init__(self, composition: Composition) -> None:
        self.experiment = composition.experiment
        task, strategy = self.experiment.task, self.experiment.strategy
        trained = fields_of(strategy, LocalTraining)
        if composition.samples is None or not trained:
            raise ConfigError("fedsim tune: nothing to choose; only local steps on samples use an engine")
        (local,) = trained.values()
        self.samples, self.local = composition.samples, local
        clients = torch.arange(len(task.num_examples))
        size = min(strategy.at_work(len(clients)), MAX_COHORT)
        ids = choose(clients, size, server_rng(self.experiment.seed, "server", 0))
        self.ids = ids[task.num_examples[ids].cpu() > 0]
        if not len(self.ids):
            raise ConfigError("fedsim tune: no client of the first cohort has a sample")
        self.most = int(local.schedule.num_steps(task.num_examples[self.ids]).max())
        self.steps = 1
        runtime = composition.resolved["runtime"]
        self.precision, self.data, self.graphs = runtime["precision"], runtime["data"], runtime["graphs"]
        self.native = suits(self.samples.module, self.samples.loss, self.experiment.device, self.precision)

    def settle(self, candidate: Candidate) -> None:
        """Choose K so that a call takes about `SECONDS`, from a call of one step."""
        self.steps = 1
        self.rate(candidate, repeats=1)
        seconds = len(self.ids) / self.rate(candidate, repeats=1)
        self.steps = max(1, min(self.most, int(SECONDS / seconds)))

    def rate(self, candidate: Candidate, repeats: int = REPEATS) -> float:
        """Client steps a second, the best of some repeats after one call that warms up.

        Raises:
            ClientError: if the candidate can't train this model.
        """
        experiment = self.experiment
        graphs = self.graphs and graphed(candidate.engine, experiment.device)
        plan = Plan(candidate.engine, candidate.stack, "", candidate.native, graphs, self.data)
        here = task_of(self.samples, plan, self.precision, experiment.device)
        schedule = replace(self.local.schedule, epochs=None, steps=self.steps)
        runner = StackRunner(
            here, LocalWork(replace(self.local, schedule=schedule)), experiment.seed, experiment.device
        )
        executor = InProcess(runner, width=candidate.stack, workers=candidate.workers, threads=experiment.threads)
        try:
            executor.run(self._jobs())
            best = min(self._timed(executor) for _ in range(repeats))
        finally:
            executor.close()
        return len(self.ids) * self.steps / best

    def _timed(self, executor: InProcess) -> float:
        started = time.perf_counter()
        executor.run(self._jobs())
        if self.experiment.device.type == "cuda":
            torch.cuda.synchronize(self.experiment.device)
        return time.perf_counter() - started

    def _jobs(self) -> Jobs:
        r = len(self.ids)
        none = torch.zeros(r, dtype=torch.int64)
        x = self.samples.x0.to(self.experiment.device)
        return Jobs("train", self.ids, none, [{"x": x}], none, weights=torch.full((r,), 1.0 / r))


def tune(raw: Mapping[str, Any], source: str) -> Iterator[str]:
    """Measure and report, line by line as results come in.

    Args:
        raw: the experiment file's content after overrides.
        source: its name, for messages.

    Raises:
        ConfigError: for a mistake in the file, or if the run has nothing to choose.
    """
    composition = compose(raw, source)
    composition.close()
    bench = Bench(composition)
    rule = composition.resolved["runtime"]
    cores = worker_counts(bench.experiment)[-1]
    width = min(rule["stack"], -(-len(bench.ids) // rule["stacks"]))
    auto = Candidate(rule["engine"], width, cores, rule["native"])
    bench.settle(auto)
    yield (
        f"{len(bench.ids)} clients of a cohort, {bench.steps} of {bench.most} local steps, on "
        f"{bench.experiment.device} ({cores} worker(s) by default); client steps a second, best of {REPEATS}"
    )
    yield f"{'engine':<10}{'native':<8}{'stack':>6}{'workers':>9}{'steps/s':>12}"
    rates: dict[Candidate, float] = {}
    yield from _measure(bench, first_candidates(auto, len(bench.ids)), rates)
    winner = best(rates)
    others = [replace(winner, engine=name, native=False) for name in ("stacked", "compiled")]
    if bench.native:
        others.append(replace(winner, engine="stacked", native=True))
    yield from _measure(bench, others, rates)
    winner = best(rates)
    share = {n: -(-len(bench.ids) // n) for n in worker_counts(bench.experiment)}  # so that each has a stack
    others = [replace(winner, workers=n, stack=min(winner.stack, width)) for n, width in share.items()]
    yield from _measure(bench, others, rates)
    winner = best(rates)
    yield (
        f"fastest here: runtime.engine={winner.engine} runtime.native={str(winner.native).lower()} "
        f"runtime.stack={winner.stack} runtime.workers={winner.workers}"
    )
    if auto in rates:
        ratio = rates[winner] / rates[auto]
        yield f"{ratio:.2f} times the rate of what auto chooses here ({auto.engine}, {auto.stack} a stack)"
    yield "engine and stack are part of what fixes a run's bits; the number of workers is not"


def first_candidates(auto: Candidate, cohort: int) -> list[Candidate]:
    """The rule's choice, the plain loop, and stacks of every width up to the cohort, all on every core."""
    widths = [w for w in WIDTHS if w < cohort] + [cohort]
    stacked = [replace(auto, engine="stacked", stack=w) for w in widths]
    return list(dict.fromkeys([auto, replace(auto, engine="loop", stack=1, native=False), *stacked]))


def worker_counts(experiment: Any) -> list[int]:
    """1, 2, 4, ... up to one worker per core, which `auto` takes; on a GPU, where it takes one, 2 and 4 before that."""
    if experiment.device.type == "cuda":
        return [2, 4, 1]
    cores = max(1, len(os.sched_getaffinity(0)) // experiment.threads)
    return sorted({cores, *(2**k for k in range(cores.bit_length()) if 2**k <= cores)})


def best(rates: Mapping[Candidate, float]) -> Candidate:
    """The fastest; the first of equals."""
    return max(rates, key=lambda c: rates[c])


def _measure(bench: Bench, candidates: list[Candidate], rates: dict[Candidate, float]) -> Iterator[str]:
    for candidate in candidates:
        if candidate in rates:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # an engine that hands over to another one says so
            warnings.filterwarnings("ignore", ".*determinis", UserWarning)  # torch's, on a GPU, where it goes on
            try:
                rates[candidate] = bench.rate(candidate)
                yield f"{candidate}{rates[candidate]:>12,.0f}"
            except (ClientError, RuntimeError, UserWarning) as e:
                reason = str(e).partition("\n")[0]
                yield f"{candidate}{'–':>12}  {reason[:60]}"
