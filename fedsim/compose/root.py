"""An experiment file, from its first section to its last, and the run that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.clients.local_training import LocalTraining
from fedsim.compose.entries import NESTED, optimizer
from fedsim.compose.fleets import build_byzantine, build_executor, build_links, compute_device
from fedsim.compose.problems import TASKS, Problem, Site
from fedsim.compose.refusals import (
    check_keys,
    check_local,
    check_server_optimizer,
    check_state_scope,
    check_strategy,
)
from fedsim.compose.sections import Clients, Data, Local, Log, Runtime
from fedsim.config import Reader
from fedsim.data.federated import FederatedData
from fedsim.engine import ENGINES
from fedsim.loop import Checkpoint, Evaluate, Experiment, Stop
from fedsim.memory import Memory
from fedsim.sim.executor import Executor, InProcess, StackRunner
from fedsim.sim.fleet import SimFleet
from fedsim.sinks import Sink, make_sinks
from fedsim.strategies import STRATEGIES
from fedsim.strategy import Strategy, parts
from fedsim.task import Schedule, Task
from fedsim.tasks.supply import check as check_supply


@dataclass
class Composition:
    """A run that is ready to start, and what `fedsim check` prints about it.

    Args:
        experiment: what the loop runs.
        executor: runs stacks of clients.
        pool: threads of this process, for evaluation; the executor itself where that is in process.
        resolved: the file with every default, and with what `auto` chose.
        plan: {what: in words}.
        sinks: where rows go.
        data, module: of a classification task.
    """

    experiment: Experiment
    executor: Executor
    pool: InProcess
    resolved: dict[str, Any]
    plan: dict[str, str]
    sinks: list[Sink]
    data: FederatedData | None = None
    module: nn.Module | None = None

    def close(self) -> None:
        """Stop the workers."""
        self.executor.close()
        self.pool.close()


def compose(raw: Mapping[str, Any], source: str, folder: Path | None = None) -> Composition:
    """Build everything an experiment file describes.

    Args:
        raw: the file's content after overrides.
        source: the file's name, for messages.
        folder: the run's folder, for client memory on disk.

    Raises:
        ConfigError: for the first mistake found.
    """
    reader = Reader(raw, source, NESTED)
    seed = reader.value("seed", int, 0)
    rounds = reader.value("rounds", int, 100)
    if rounds < 1:
        raise reader.error("rounds", f"must be at least 1, got {rounds}")
    stop = reader.section("stop", Stop)
    runtime = reader.section("runtime", Runtime)
    clients = reader.section("clients", Clients)
    root = reader.section("data", Data).root
    local = reader.section("local", Local)
    schedule = _schedule(reader, local)
    device = compute_device(reader, runtime.device)

    cohort_size, plain = _outlook(reader, local.optimizer)
    site = Site(reader, seed, clients, runtime, device, root, schedule, cohort_size, plain)
    problem: Problem = reader.entry("task", TASKS, default="classification", given={"site": site})
    task, layout, n = problem.task, problem.task.layout, len(problem.task.num_examples)
    strategy = _strategy(reader, task, local, schedule, rounds)
    uplink, downlink = build_links(reader, strategy, layout, seed)
    check_state_scope(reader, strategy, uplink)
    byzantine = build_byzantine(reader, clients.byzantine, task, seed)
    devices = clients.devices(n)

    evaluate = reader.section("evaluate", Evaluate)
    checkpoint = reader.section("checkpoint", Checkpoint)
    allow_divergence = reader.value("allow_divergence", bool, False)
    log = reader.section("log", Log)
    reader.finish()
    sinks = _sinks(reader, log)

    runner = StackRunner(task, strategy, seed, device, uplink)
    executor, workers = build_executor(runtime, runner, problem.plan.width, device)
    pool = executor if isinstance(executor, InProcess) else InProcess(runner, width=1, workers=1)
    fleet = SimFleet(
        num_examples=task.num_examples,
        model_size=layout.size,
        executor=executor,
        devices=devices,
        memory=Memory(n, folder / "memory" if folder is not None and runtime.memory == "disk" else None),
        seed=seed,
        reply_bits=None if uplink is None else uplink.compressor.bits(layout.size),
        downlink=downlink,
        byzantine=byzantine,
    )
    experiment = Experiment(
        task=task,
        strategy=strategy,
        fleet=fleet,
        pool=pool,
        rounds=rounds,
        seed=seed,
        config=reader.resolved,
        evaluate=evaluate,
        stop=stop,
        checkpoint=checkpoint,
        allow_divergence=allow_divergence,
        device=device,
        threads=runtime.threads,
    )
    engine = problem.plan.engine if problem.plan.engine in ENGINES else runtime.engine
    reader.resolved["clients"]["count"] = n
    reader.resolved["runtime"] |= {"engine": engine, "stack": problem.plan.width, "device": str(device)}
    plan = describe(experiment, problem, workers)
    return Composition(experiment, executor, pool, reader.resolved, plan, sinks, problem.data, problem.module)


def _schedule(reader: Reader, local: Local) -> Schedule:
    try:
        return local.schedule()
    except ValueError as e:
        raise reader.error("local", str(e).removeprefix("local: ").replace("local.", "")) from e


def _outlook(reader: Reader, optimizer: Any) -> tuple[int | None, bool]:
    """(cohort size if set, whether local steps are plain SGD), which the engine's rule wants to know beforehand."""
    entry = reader.raw.get("strategy") or "fedavg"
    target, _, fields_given = reader.named(STRATEGIES, entry, "strategy")
    traits = check_keys(reader, target, fields_given)
    size = fields_given.get("cohort_size")
    spec = {"name": optimizer} if isinstance(optimizer, str) else optimizer
    plain = isinstance(spec, Mapping) and spec.get("name") == "sgd" and set(spec) <= {"name", "lr"}
    return size if isinstance(size, int) else None, plain and not traits.two_points and traits.local_rules != "rate"


def _strategy(reader: Reader, task: Task, local: Local, schedule: Schedule, rounds: int) -> Strategy:
    """The strategy, with the local training that it is to use and optimizers that fit the task."""
    layout = task.layout
    rule, reader.resolved["local"]["optimizer"] = optimizer(
        reader, "local.optimizer", local.optimizer, layout, lambda made: check_supply(task, made)
    )
    reader.nested["server_optimizer"] = lambda r, key, value: optimizer(r, key, value, layout, check_server_optimizer)
    given = {"local": LocalTraining(optimizer=rule, schedule=schedule, rounds=rounds)}
    made = reader.entry("strategy", STRATEGIES, default="fedavg", given=given)
    strategy = check_strategy(reader, made, task.num_examples)
    check_local(reader, strategy, task)
    if not parts(strategy, LocalTraining):
        del reader.resolved["local"]  # the resolved file must pass the check above too
    return strategy


def _sinks(reader: Reader, log: Log) -> list[Sink]:
    try:
        return make_sinks(list(log.sinks))
    except ValueError as e:
        raise reader.error("log.sinks", str(e)) from e


def describe(experiment: Experiment, problem: Problem, workers: str) -> dict[str, str]:
    """The plan, line by line."""
    strategy, layout, plan = experiment.strategy, experiment.task.layout, problem.plan
    n = experiment.task.num_examples
    cohort = strategy.at_work(len(n))
    steps = torch.ones(1, dtype=torch.int64)
    for local in parts(strategy, LocalTraining).values():
        steps = local.schedule.num_steps(n)
    buffers = f" and {layout.size - layout.num_trainable:,} buffer entries" if layout.num_buffers else ""
    stack_bytes = 4 * layout.size * min(plan.width, cohort)
    model_bits = 32 * layout.size
    return {
        "clients": f"{len(n):,}, {cohort:,} of them in a round",
        "samples per client": f"{int(n.min()):,} to {int(n.max()):,}, median {int(n.median()):,}; "
        f"{int((n == 0).sum()):,} clients have none",
        "local steps": f"{int(steps.min()):,} to {int(steps.max()):,}",
        "model": f"{layout.num_trainable:,} parameters{buffers}",
        "engine": f"{plan.engine}, {plan.width} clients a stack ({plan.reason})",
        "workers": workers,
        "device": str(experiment.device),
        "memory": f"about {3 * stack_bytes / 2**20:,.1f} MiB a worker for parameters, gradients and one buffer",
        "bits per round": f"{model_bits * cohort / 1e6:,.2f} Mbit down and as many up for every model-sized message",
    }
