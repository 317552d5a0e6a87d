"""An experiment file, from its first section to its last, and the run that it describes.

`read_file` says what the file holds and `_build` makes it, in the order in which things are known: data and module,
optimizers, the strategy; from these the plan; from the plan engine and task; last the fleet.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedsim.clients.local_training import LocalTraining
from fedsim.compose.entries import KINDS
from fedsim.compose.fleets import (
    build_absence,
    build_byzantine,
    build_executor,
    build_links,
    build_memory,
    compute_device,
    with_compressors,
)
from fedsim.compose.identity import identity_of
from fedsim.compose.problems import plan_of, problem_of, task_of
from fedsim.compose.refusals import (
    check_local,
    check_personalise,
    check_prox,
    check_seen,
    check_selection,
    check_state_scope,
    check_step,
    check_strategy,
)
from fedsim.compose.sections import File
from fedsim.compose.supervised import Samples
from fedsim.compose.work import (
    Work,
    absence_in_words,
    frozen_in_words,
    in_words,
    selection_in_words,
    topology_in_words,
    work_of,
)
from fedsim.config import OBJECT, ConfigError, at, decode, naming
from fedsim.engine import Plan
from fedsim.engine.precision import same_bits_again
from fedsim.experiment import Experiment
from fedsim.fleet import Cost
from fedsim.memory import Memory
from fedsim.optim import Optimizer
from fedsim.pages import room_on_gpu
from fedsim.sim.calls import replies_ahead
from fedsim.sim.executor import Executor, StackRunner
from fedsim.sim.fleet import SimFleet
from fedsim.sinks import Sink, json_lines_first
from fedsim.strategies.server import Synchronous
from fedsim.strategy import Strategy, fields_of
from fedsim.task import Task

NOTES = ("versions", "identity")  # sections of a resolved file that say what ran, and are not read again
SAMPLES_LIE = {"device": "on the device", "host": "in RAM"}
ROWS_LIE = {"device": "on the device", "ram": "in RAM", "disk": "in files of the run's folder"}


@dataclass
class Composition:
    """A run that is ready to start, and what `fedsim check` prints about it.

    Args:
        experiment: what the loop runs.
        executor: runs stacks of clients, and evaluates.
        memory: rows that clients keep, in RAM until it is given a folder.
        resolved: the file with every default, and with what `auto` chose.
        plan: {what: in words}.
        sinks: where rows go.
        samples: what a task on samples is made of; None for a formula.
    """

    experiment: Experiment
    executor: Executor
    memory: Memory
    resolved: dict[str, Any]
    plan: dict[str, str]
    sinks: list[Sink]
    samples: Samples | None = None

    def close(self) -> None:
        """Stop the workers."""
        self.executor.close()


def compose(raw: Mapping[str, Any], source: str) -> Composition:
    """Build everything an experiment file describes.

    Args:
        raw: the file's content after overrides.
        source: the file's name, for messages.

    Raises:
        ConfigError: for the first mistake found.
    """
    with naming(source):
        return _build(*read_file(raw))


def read_file(raw: Mapping[str, Any]) -> tuple[File, dict[str, Any]]:
    """(what the file says, the same as plain data with every default).

    Raises:
        ConfigError: for a section, a key or a value that has no place there.
    """
    call = decode(File, {k: v for k, v in raw.items() if k not in NOTES}, "", KINDS)
    file, resolved = call(), copy.deepcopy(call.resolved)
    for key, reader, why in (
        ("partition", file.task, "has no data to divide"),
        ("local", file.strategy, "takes no local steps"),
    ):
        if not reader.takes(key):
            if raw.get(key):
                why = "brings its own" if reader.name.startswith(OBJECT) else why
                reason = f"{reader.name} {why}, so nothing would read this section"
                raise ConfigError(f"{key}: {reason}; leave it out")
            del resolved[key]
    return file, resolved


def _build(file: File, resolved: dict[str, Any]) -> Composition:
    device = compute_device(file.runtime.device)
    same_bits_again(device)
    problem = problem_of(file, device)
    strategy = _strategy(file, problem)
    work = work_of(strategy, problem.num_examples)
    with at("runtime"):
        plan = plan_of(problem, work, file.runtime, device)
    ways_out = f"{'set runtime.data=host, ' * (plan.data == 'device')}take a larger card, or runtime.device=cpu"
    with room_on_gpu("runtime.device: the data and the model have", ways_out):
        task = task_of(problem, plan, file.runtime.precision, device)
    check_local(file.strategy.name, strategy, task)
    check_prox(file.strategy.name, strategy, task)
    check_step(strategy, task)
    check_personalise(file.evaluate.personalise.epochs, strategy, task)
    check_selection(strategy, task)
    if isinstance(problem, Samples):
        check_seen(strategy, task)
    _resolve(resolved, problem, strategy, plan, device)
    fleet, workers, kept = _fleet(file, task, strategy, work, plan.width, device)
    resolved["runtime"] |= {"stacks": fleet.executor.stacks, "memory": kept}
    experiment = Experiment(
        task=task,
        strategy=strategy,
        fleet=fleet,
        pool=fleet.executor,
        rounds=file.rounds,
        seed=file.seed,
        config=resolved,
        evaluate=file.evaluate,
        stop=file.stop,
        checkpoint=file.checkpoint,
        allow_divergence=file.allow_divergence,
        device=device,
        threads=file.runtime.threads,
    )
    with at("strategy"):
        sent = strategy.sent(task.layout)
        x = torch.empty(sent.size)
        strategy.check_fleet(fleet, x)
        if isinstance(strategy, Synchronous) and strategy.deadline is not None:
            for cost in strategy.costs:
                fleet.check_possible(cost, strategy.deadline, x=x)
    words = in_words(work, plan, fleet.executor.stacks, task.layout, sent, task.num_examples)
    words |= frozen_in_words(problem.module) if isinstance(problem, Samples) else {}
    words |= {"samples": SAMPLES_LIE[plan.data]} if isinstance(problem, Samples) else {}
    words |= selection_in_words(resolved["strategy"]) | topology_in_words(strategy, len(fleet.clients), sent, file.seed)
    if fleet.absence.kills:
        words["absence"] = _absence(file, strategy, fleet, sent.size)
    words |= {"client rows": ROWS_LIE[kept], "workers": workers, "device": str(device)}
    samples = problem if isinstance(problem, Samples) else None
    notes = {"data": " ".join(samples.data.notes)} if samples is not None and samples.data.notes else {}
    made = experiment, fleet.executor, fleet.memory, resolved, notes | words, json_lines_first(file.log.sinks)
    return Composition(*made, samples)


def _absence(file: File, strategy: Strategy, fleet: SimFleet, size: int) -> str:
    """Who will be there, in words, for a run whose rounds take as long as a client's job on average."""
    local = next(iter(fields_of(strategy, LocalTraining).values()), None)
    jobs = fleet.job_times(Cost() if local is None else local.cost, 1, x=torch.empty(size))
    seconds = file.stop.bounds.get("virtual_seconds") or file.rounds * float(jobs.mean.mean())
    n = len(fleet.clients)
    return absence_in_words(fleet.absence, min(strategy.at_work(n), n), n, seconds)


def _resolve(
    out: dict[str, Any], problem: Task | Samples, strategy: Strategy, plan: Plan, device: torch.device
) -> None:
    """Write down what `auto` chose: all that fixes the run's bits has its key; and what was there to work on."""
    out["identity"] = identity_of(problem)
    out["clients"]["count"] = len(problem.num_examples)
    out["runtime"] |= {"stack": plan.width, "device": str(device)}
    if isinstance(problem, Samples):
        out["runtime"] |= {k: getattr(plan, k) for k in ("engine", "native", "graphs", "data")}
    if out["strategy"]["name"].startswith(OBJECT):  # for readers, and to tell it from another on resume
        out["strategy"] |= {k: v for k, v in vars(strategy).items() if isinstance(v, bool | int | float | str | None)}
        return
    rules = [(rule, out["strategy"][name]) for name, rule in fields_of(strategy, Optimizer).items()]
    rules += [(local.optimizer, out["local"]["optimizer"]) for local in fields_of(strategy, LocalTraining).values()]
    for rule, section in rules:
        if isinstance(rule, Optimizer) and not rule.is_plain_sgd and rule.settings.backend == "auto":
            section["backend"] = rule.backend_on(device)


def _strategy(file: File, problem: Task | Samples) -> Strategy:
    """The strategy, with the local training that it is to use and optimizers for vectors of this layout."""
    with at("local"):
        schedule = file.local.schedule()
    optimizer = file.local.optimizer(layout=problem.layout)
    local, n = LocalTraining(optimizer=optimizer, schedule=schedule, rounds=file.rounds), len(problem.num_examples)
    made = file.strategy(layout=problem.layout, local=local, count=n, prox=problem.prox)
    made = check_strategy(made, problem.num_examples)
    return with_compressors(made, made.sent(problem.layout))


def _fleet(
    file: File, task: Task, strategy: Strategy, work: Work, width: int, device: torch.device
) -> tuple[SimFleet, str, str]:
    """(simulated fleet, what runs the clients in words, where their rows are kept)."""
    n, runtime, sent = len(task.num_examples), file.runtime, strategy.sent(task.layout)
    uplink, downlink = build_links(file, strategy, sent)
    check_state_scope(strategy, uplink)
    byzantine = build_byzantine(file.clients.byzantine, task, strategy, file.seed)
    devices, absence = file.clients.devices(count=n), build_absence(file, strategy, n)
    runner = StackRunner(task, strategy, file.seed, device, uplink)
    executor, workers = build_executor(runtime, runner, work, width, device)
    memory, kept = build_memory(runtime, file.rounds, work, task.layout, executor, device)
    runner.rows_on = memory.device
    fleet = SimFleet(
        num_examples=task.num_examples,
        model_size=sent.size,
        executor=executor,
        devices=devices,
        memory=memory,
        seed=file.seed,
        ahead=replies_ahead(width, executor.stacks, device),
        reply_bits=None if uplink is None else uplink.compressor.bits(sent.size),
        downlink=downlink,
        byzantine=byzantine,
        absence=absence,
    )
    return fleet, workers, kept
