"""The composition root: an experiment file becomes a task, a fleet and a strategy that fit together.

This is the one place that knows every table. Everything it builds can be built by hand in the same way; see
docs/tutorial.md.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clients.byzantine import ATTACKS
from clients.local_sgd import LocalSGD
from fedsim.aggregate import AGGREGATORS
from fedsim.compress import COMPRESSORS, bind
from fedsim.compress.sparsify import Identity
from fedsim.config import ConfigError, FromTable, Reader
from fedsim.data import DATASETS, PARTITIONS
from fedsim.data import build as build_data
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.data.partition import Natural
from fedsim.data.sources import as_dataset
from fedsim.engine import ENGINES, Plan, build_engine, choose
from fedsim.engine.losses import LOSSES
from fedsim.loop import Checkpoint, Evaluate, Experiment, Stop
from fedsim.memory import Memory
from fedsim.optim import Optimizer
from fedsim.optim import build as build_optimizer
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.optim.table import RULES
from fedsim.params import Layout
from fedsim.sim.byzantine import Byzantine
from fedsim.sim.devices import DEVICES
from fedsim.sim.executor import Executor, InProcess, StackRunner
from fedsim.sim.fleet import SimFleet
from fedsim.sim.links import Downlink, Uplink
from fedsim.sinks import SINKS, Sink, make_sinks
from fedsim.streams import server_rng
from fedsim.task import Schedule, Task
from fedsim.tasks.bilinear import BilinearTask
from fedsim.tasks.classification import ClassificationTask
from fedsim.tasks.models import MODELS, init_parameters
from fedsim.tasks.quadratic import Numbers, QuadraticTask
from fedsim.tasks.supply import check as check_supply
from strategies import STRATEGIES

MAX_TRIED = 1000  # clients of a cohort up to which its aggregation rule is tried before the run starts


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where a run computes. Engine, stack, threads, precision and device are part of what fixes its bits.

    Args:
        executor: in_process, ray, or auto: in-process on one device, Ray with several GPUs or an address.
        workers: stacks that run side by side; auto is one per core, or one per GPU.
        threads: intra-op threads of each worker.
        address: of a Ray cluster: "auto", "host:port", or null.
        device: cpu, cuda, cuda:1, or auto.
        stack: clients of a stack, or auto: a rule on model, sizes and device (`fedsim tune` measures).
        engine: loop, stacked, compiled, or auto.
        precision: of products; storage is float32.
        memory: where clients' rows are kept between rounds: ram, or disk (memory-mapped in the run's folder).
    """

    executor: Literal["auto", "in_process", "ray"] = "auto"
    workers: int | Literal["auto"] = "auto"
    threads: int = 1
    address: str | None = None
    device: str = "auto"
    stack: int | Literal["auto"] = "auto"
    engine: Literal["auto", "loop", "stacked", "compiled"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    memory: Literal["ram", "disk"] = "ram"

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "stack"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1 or auto, got {value}")


@dataclass(frozen=True, kw_only=True)
class Lies:
    """Byzantine clients.

    Args:
        attack: what they send.
        count: how many there are, drawn by the seed; or
        ids: which.
    """

    attack: Annotated[Any, FromTable("attack", "sign_flip")] = None
    count: int = 0
    ids: tuple[int, ...] | None = None

    def draw(self, num_clients: int, seed: int) -> Tensor:
        """[b] ids, ascending.

        Raises:
            ValueError: if there are not so many clients, or none would be honest.
        """
        if self.ids is not None:
            bad = [i for i in self.ids if not 0 <= i < num_clients]
            if bad:
                raise ValueError(f"ids: client {bad[0]} is not one of the {num_clients} clients 0..{num_clients - 1}")
            return torch.tensor(sorted(set(self.ids)), dtype=torch.int64)
        if not 0 <= self.count < num_clients:
            raise ValueError(f"count must leave at least one honest client of {num_clients}, got {self.count}")
        picked = server_rng(seed, "byzantine").choice(num_clients, size=self.count, replace=False)
        return torch.from_numpy(np.sort(picked))


@dataclass(frozen=True, kw_only=True)
class Up:
    """What clients send.

    Args:
        compressor: for every vector of a reply.
        error_feedback: add to each message what earlier ones left out.
    """

    compressor: Annotated[Any, FromTable("compressor", "identity")] = None
    error_feedback: bool = False


@dataclass(frozen=True, kw_only=True)
class Down:
    """What clients receive.

    Args:
        compressor: for the change of every model-sized vector since the last message.
    """

    compressor: Annotated[Any, FromTable("compressor", "identity")] = None


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Who takes part.

    Args:
        count: N; null takes it from the data (a natural partition) or is 100.
        devices: how fast they are.
        availability: when they can be reached; `always` for now.
        byzantine: who lies, and how.
    """

    count: int | None = None
    devices: Annotated[Any, FromTable("device", "constant")] = None
    availability: Annotated[Any, FromTable("availability", "always")] = None
    byzantine: Lies = field(default_factory=lambda: Lies())

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class Local:
    """Local training.

    Args:
        epochs: passes over a client's data; 1 unless `steps` is given.
        steps: local steps instead of epochs.
        batch_size: samples of a step, or "full" for all of a client's data.
        shuffle: a fresh order every epoch.
        optimizer: a rule of the shared core and its hyper-parameters.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int | Literal["full"] = 20
    shuffle: bool = True
    optimizer: Annotated[Any, FromTable("optimizer")] = field(default_factory=lambda: {"name": "sgd", "lr": 0.05})

    def schedule(self) -> Schedule:
        epochs = 1 if self.epochs is None and self.steps is None else self.epochs
        size = None if self.batch_size == "full" else self.batch_size
        return Schedule(epochs=epochs, steps=self.steps, batch_size=size, shuffle=self.shuffle)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where data sets lie.

    Args:
        root: a folder to look in first.
    """

    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where metrics go besides metrics.jsonl.

    Args:
        sinks: names of sinks.
    """

    sinks: tuple[str, ...] = ("jsonl",)


@dataclass
class Composition:
    """A run that is ready to start, and what `fedsim check` prints about it."""

    experiment: Experiment
    executor: Executor
    resolved: dict[str, Any]
    plan: dict[str, str]
    sinks: list[Sink]
    data: FederatedData | None = None
    module: nn.Module | None = None

    def close(self) -> None:
        self.executor.close()
        if self.experiment.pool is not self.executor:
            self.experiment.pool.close()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Site:
    """What a task needs to know of the rest of the file."""

    reader: Reader
    seed: int
    clients: Clients
    runtime: Runtime
    device: torch.device
    root: str | None
    schedule: Schedule
    cohort_size: int | None
    plain: bool


@dataclass
class _Built:
    """What building a task gave."""

    task: Task
    plan: Plan
    data: FederatedData | None = None
    module: nn.Module | None = None


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
    try:
        schedule = local.schedule()
    except ValueError as e:
        raise reader.error("local", str(e).removeprefix("local: ").replace("local.", "")) from e
    device = _device(runtime.device, reader)
    cohort_size, plain = _outlook(reader, local.optimizer)
    site = _Site(reader, seed, clients, runtime, device, root, schedule, cohort_size, plain)
    built: _Built = reader.entry("task", TASKS, default="classification", given={"site": site})
    task = built.task
    optimizer, reader.resolved["local"]["optimizer"] = _optimizer(
        reader, "local.optimizer", local.optimizer, task.layout, lambda made: check_supply(task, made)
    )
    reader.nested["server_optimizer"] = lambda r, key, value: _optimizer(r, key, value, task.layout, _check_server)
    strategy = reader.entry(
        "strategy",
        STRATEGIES,
        default="fedavg",
        given={"local": LocalSGD(optimizer=optimizer, schedule=schedule, rounds=rounds)},
    )
    _check_strategy(reader, strategy, len(task.num_examples))
    _check_local(reader, strategy, task)
    up, down = reader.section("uplink", Up), reader.section("downlink", Down)
    uplink, downlink = _links(reader, up, down, strategy, task.layout, seed)
    _check_state_scope(reader, strategy, uplink)
    n = len(task.num_examples)
    byzantine = _byzantine(reader, clients.byzantine, n, seed, built)
    devices = clients.devices(n)
    evaluate = reader.section("evaluate", Evaluate)
    every = reader.section("checkpoint", Checkpoint)
    diverge = reader.value("allow_divergence", bool, False)
    log = reader.section("log", Log)
    reader.finish()
    try:
        sinks = make_sinks(list(log.sinks))
    except ValueError as e:
        raise reader.error("log.sinks", str(e)) from e

    runner = StackRunner(task, strategy, seed, device, uplink)
    executor, workers = _executor(runtime, runner, built.plan.width, device)
    pool = executor if isinstance(executor, InProcess) else InProcess(runner, width=1, workers=1)
    on_disk = runtime.memory == "disk" and folder is not None
    fleet = SimFleet(
        num_examples=task.num_examples,
        model_size=task.layout.size,
        executor=executor,
        devices=devices,
        memory=Memory(len(task.num_examples), folder / "memory" if on_disk and folder else None),
        seed=seed,
        reply_bits=None if uplink is None else uplink.compressor.bits(task.layout.size),
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
        checkpoint=every,
        allow_divergence=diverge,
        device=device,
        threads=runtime.threads,
    )
    reader.resolved["clients"]["count"] = len(task.num_examples)
    engine = built.plan.engine if built.plan.engine in ENGINES else runtime.engine
    reader.resolved["runtime"] |= {"engine": engine, "stack": built.plan.width, "device": str(device)}
    plan = describe(experiment, built, workers, strategy)
    return Composition(experiment, executor, reader.resolved, plan, sinks, built.data, built.module)


def describe(experiment: Experiment, built: _Built, workers: str, strategy: Any) -> dict[str, str]:
    """The plan, line by line."""
    task, layout = experiment.task, experiment.task.layout
    n = task.num_examples
    cohort = getattr(strategy, "cohort_size", None) or len(n)
    local = getattr(strategy, "local", None)
    steps = local.schedule.num_steps(n) if local is not None else torch.ones(1, dtype=torch.int64)
    width = built.plan.width
    stack_bytes = 4 * layout.size * min(width, cohort)
    model_bits = 32 * layout.size
    return {
        "clients": f"{len(n):,}, {cohort:,} of them in a round",
        "samples per client": f"{int(n.min()):,} to {int(n.max()):,}, median {int(n.median()):,}; "
        f"{int((n == 0).sum()):,} clients have none",
        "local steps": f"{int(steps.min()):,} to {int(steps.max()):,}",
        "model": f"{layout.num_trainable:,} parameters"
        + (f" and {layout.size - layout.num_trainable:,} buffer entries" if layout.num_buffers else ""),
        "engine": f"{built.plan.engine}, {width} clients a stack ({built.plan.reason})",
        "workers": workers,
        "device": str(experiment.device),
        "memory": f"about {3 * stack_bytes / 2**20:,.1f} MiB a worker for parameters, gradients and one buffer",
        "bits per round": f"{model_bits * cohort / 1e6:,.2f} Mbit down and as many up for every model-sized message",
    }


# Tasks ----------------------------------------------------------------------------------------------------------


def _classification(
    site: _Site,
    *,
    dataset: Annotated[Any, FromTable("dataset", "digits")],
    model: Annotated[Any, FromTable("model", "mlp")],
    loss: str = "cross_entropy",
) -> _Built:
    """Classes or next tokens: any data set, any torch module."""
    reader, runtime = site.reader, site.runtime
    source = dataset(site)
    partition = reader.entry("partition", PARTITIONS, default="iid")
    natural = isinstance(source, FederatedData) or isinstance(partition, Natural)
    count = site.clients.count if natural else site.clients.count or 100
    try:
        data = build_data(source, partition, count, site.seed)
    except ConfigError:
        raise
    except ValueError as e:
        raise reader.error("partition", str(e)) from e
    module, x0 = init_parameters(lambda: model(data), site.seed)
    _check_model(reader, module, data, loss)
    layout = Layout.of_module(module)
    loss_of = LOSSES[loss] if loss in LOSSES else reader.imported(loss, "task.loss") if ":" in loss else None
    if loss_of is None:
        raise reader.error("task.loss", f"unknown loss {loss!r}; known: {', '.join(LOSSES)}, or pkg.module:name")
    counts = data.num_examples
    size = site.schedule.batch_size or int(counts.max())
    plan = choose(
        module,
        layout,
        device=site.device,
        batch_size=min(size, int(counts.max())),
        steps=int(site.schedule.num_steps(counts).max()),
        num_clients=min(site.cohort_size or len(counts), len(counts)),
        engine=runtime.engine,
        stack=runtime.stack,
        precision=runtime.precision,
        plain=site.plain,
    )
    engine = build_engine(plan.engine, module, layout, loss_of, site.device, runtime.precision)
    task = ClassificationTask(data.to(site.device), module, x0, engine, loss_of)
    return _Built(task, plan, data, module)


def _quadratic(
    site: _Site,
    *,
    a: Numbers | None = None,
    b: Numbers | None = None,
    x0: float | tuple[float, ...] | None = None,
    dim: int = 10,
    spread: float = 1.0,
    noise: float = 0.0,
) -> _Built:
    """Clients f_i(x) = 1/2 (x - b_i)' A_i (x - b_i) with a known solution; given, or drawn with `dim` and `spread`."""
    if (a is None) != (b is None):
        raise ValueError("give both a and b, one entry per client, or neither to have them drawn")
    if a is None:
        task = QuadraticTask.drawn(site.clients.count or 100, dim, site.seed, spread=spread, noise=noise)
        if x0 is not None:
            task.x0 = _start(x0, dim)
    else:
        at, bt = _numbers("a", a), _numbers("b", b)
        if site.clients.count not in (None, len(bt)):
            raise ValueError(
                f"b has {len(bt)} entries but clients.count is {site.clients.count}; leave one of them out"
            )
        task = QuadraticTask(at, bt, _start(0.0 if x0 is None else x0, 1 if bt.ndim == 1 else bt.shape[1]), noise)
    width = site.runtime.stack if site.runtime.stack != "auto" else max(1, min(1024, len(task.num_examples)))
    return _Built(task.to(site.device), Plan("exact", width, "the gradient is a formula"))


def _numbers(name: str, value: Any) -> Tensor:
    try:
        return torch.tensor(value, dtype=torch.float32)
    except ValueError as e:
        raise ValueError(f"{name}: {e}; give every client an entry of the same shape") from e


def _start(x0: float | tuple[float, ...], dim: int) -> Tensor:
    value = torch.tensor(x0, dtype=torch.float32)
    return value.expand(dim).clone() if value.ndim == 0 else value


def _bilinear(
    site: _Site, *, dim: int = 50, low: float = 0.5, high: float = 2.0, lam: float = 0.0, noise: float = 0.0
) -> _Built:
    """Saddle points x'A_m y + ... with a known solution; `dim` numbers each in x and y, spectrum [low, high]."""
    if dim < 1 or not 0 < low <= high or lam < 0 or noise < 0:
        raise ValueError(
            f"needs dim >= 1, 0 < low <= high, lam >= 0, noise >= 0; got {dim}, {low}, {high}, {lam}, {noise}"
        )
    count = site.clients.count or 25
    task = BilinearTask.drawn(count, dim, site.seed, low=low, high=high, lam=lam, noise=noise)
    width = site.runtime.stack if site.runtime.stack != "auto" else min(1024, count)
    return _Built(task.to(site.device), Plan("exact", width, "the operator is a formula"))


TASKS: dict[str, Callable[..., _Built]] = {
    "classification": _classification,
    "quadratic": _quadratic,
    "bilinear": _bilinear,
}


def _links(
    reader: Reader, up: Up, down: Down, strategy: Any, layout: Layout, seed: int
) -> tuple[Uplink | None, Downlink | None]:
    """The compressed links, None where nothing is compressed; refuses what does not fit the model or the strategy."""
    own = [name for name, value in vars(strategy).items() if hasattr(value, "omega")]
    for key in own:
        _check_compressor(reader, f"strategy.{key}", getattr(strategy, key), layout)
    made = []
    for key, compressor in (("uplink", up.compressor), ("downlink", down.compressor)):
        plain = isinstance(compressor, Identity)
        if not plain and hasattr(strategy, "no_links"):
            raise reader.error(f"{key}.compressor", f"does not go with this strategy: {strategy.no_links}")
        if not plain and own:
            raise reader.error(
                f"{key}.compressor", f"this strategy compresses by itself; set strategy.{own[0]} instead"
            )
        _check_compressor(reader, f"{key}.compressor", compressor, layout)
        made.append(None if plain else bind(compressor, layout))
    if made[0] is None and up.error_feedback:
        raise reader.error("uplink.error_feedback", "needs an uplink.compressor that leaves something out")
    uplink = None if made[0] is None else Uplink(compressor=made[0], error_feedback=up.error_feedback)
    return uplink, None if made[1] is None else Downlink(compressor=made[1], seed=seed)


def _check_compressor(reader: Reader, key: str, compressor: Any, layout: Layout) -> None:
    try:
        bind(compressor, layout).bits(layout.size)
    except ValueError as e:
        raise reader.error(key, str(e)) from e


def _byzantine(reader: Reader, lies: Lies, num_clients: int, seed: int, built: _Built) -> Byzantine | None:
    try:
        ids = lies.draw(num_clients, seed)
    except ValueError as e:
        raise reader.error("clients.byzantine", str(e)) from e
    if not len(ids):
        return None
    if lies.attack.on_data:
        if not isinstance(built.task, ClassificationTask):
            raise reader.error("clients.byzantine.attack", "poisons labels, which this task does not have")
        built.task.poison(ids, lies.attack.poison)
    return Byzantine(ids=ids, attack=lies.attack, on_data=lies.attack.on_data, seed=seed)


def _outlook(reader: Reader, optimizer: Any) -> tuple[int | None, bool]:
    """(cohort size if set, whether local steps are plain SGD), which the engine's rule wants to know beforehand."""
    entry = reader.raw.get("strategy") or "fedavg"
    target, _, fields_given = reader.named(STRATEGIES, entry, "strategy")
    size = fields_given.get("cohort_size")
    spec = {"name": optimizer} if isinstance(optimizer, str) else optimizer
    plain = isinstance(spec, Mapping) and spec.get("name") == "sgd" and set(spec) <= {"name", "lr"}
    return size if isinstance(size, int) else None, plain and getattr(target, "plain_steps", False)


def _check_local(reader: Reader, strategy: Any, task: Task) -> None:
    """Refuse a section that nothing would read, and local steps on a task where they cannot work."""
    local_steps = hasattr(strategy, "local")
    if not local_steps and reader.raw.get("local"):
        name = reader.resolved["strategy"]["name"]
        raise reader.error("local", f"{name} takes no local steps, so nothing would read this section; leave it out")
    if not local_steps:
        del reader.resolved["local"]  # the resolved file must pass this check too
    if hasattr(strategy, "no_links") and task.layout.num_buffers:
        name = reader.resolved["strategy"]["name"]
        raise reader.error(
            "strategy",
            f"{name} steps on parameters only, and this model has buffers (BatchNorm or frozen parameters); "
            "use a model without, such as resnet with GroupNorm",
        )
    if local_steps and isinstance(task, BilinearTask) and not task.lam:
        raise reader.error(
            "strategy",
            "local steps along a bilinear operator spiral away from the saddle point; set task.lam above 0, or use "
            "extragradient, masha1 or masha2",
        )


def _check_state_scope(reader: Reader, strategy: Any, uplink: Uplink | None) -> None:
    """Refuse to average states where a strategy does not do it, or a compressor made for the model would meet them."""
    if not hasattr(strategy, "local") or strategy.local.optimizer.state_scope != "server":
        return
    key, name = "local.optimizer.state_scope", reader.resolved["strategy"]["name"]
    if not getattr(strategy, "averages_state", False):
        raise reader.error(key, f"server is not available for strategy {name}; take round or client, or fedavg")
    if uplink is not None:
        raise reader.error(key, "server sends states that uplink.compressor does not fit; take round or client")


# Nested entries --------------------------------------------------------------------------------------------------


def _dataset(reader: Reader, key: str, value: Any) -> tuple[Callable[[_Site], Any], Any]:
    target, name, rest = reader.named(DATASETS, value, key)
    from_site = [k for k in ("root", "seed") if k not in rest]
    arguments, resolved = reader.bind(target, rest, key, from_site)

    def read(site: _Site) -> Dataset | FederatedData:
        made = reader.call(target, {"root": site.root, "seed": site.seed, **arguments}, key)
        try:
            return as_dataset(made, name)
        except ValueError as e:
            raise reader.error(key, str(e)) from e

    return read, {"name": name, **resolved}


def _model(reader: Reader, key: str, value: Any) -> tuple[Callable[[FederatedData], nn.Module], Any]:
    target, name, rest = reader.named(MODELS, value, key)
    arguments, resolved = reader.bind(target, rest, key, ("input_shape", "num_classes"))

    def make(data: FederatedData) -> nn.Module:
        sizes = {"input_shape": tuple(data.inputs.shape[1:]), "num_classes": data.num_classes}
        module = reader.call(target, {**arguments, **sizes}, key)
        if not isinstance(module, nn.Module):
            raise reader.error(key, f"{name} gave a {type(module).__name__}, not a torch.nn.Module")
        return module

    return make, {"name": name, **resolved}


def _optimizer(
    reader: Reader,
    key: str,
    spec: Any,
    layout: Layout,
    check: Callable[[Optimizer], None],
) -> tuple[Optimizer, Any]:
    """A rule that `check` accepts."""
    spec = {"name": spec} if isinstance(spec, str) else spec
    if isinstance(spec, Mapping) and ":" in str(spec.get("name")):
        return _foreign(reader, key, spec, layout)
    try:
        made = build_optimizer(spec, layout)
        check(made)
        return made, dict(spec)
    except ValueError as e:
        raise reader.error(key, str(e).removeprefix("optimizer: ").replace("optimizer.", "")) from e


def _check_server(optimizer: Optimizer) -> None:
    """A server has a gradient and nothing else to offer, and keeps its state as long as it runs."""
    optimizer.check_needs({"grad"})
    if optimizer.state_scope != "round":
        raise ValueError("state_scope is for local optimizers, the server always keeps its state; leave it out")


def _foreign(reader: Reader, key: str, spec: Mapping[str, Any], layout: Layout) -> tuple[Any, Any]:
    """Any class of torch optimizers by import path, with one warning."""
    arguments = {k: v for k, v in spec.items() if k != "name"}
    make = reader.imported(spec["name"], f"{key}.name")
    try:
        made = ForeignOptimizer(make, arguments, layout)
    except ValueError as e:
        raise reader.error(key, str(e)) from e
    warnings.warn(f"{key}: {spec['name']} is not batched, clients step one after the other", stacklevel=2)
    return made, dict(spec)


def _from(table: Mapping[str, Callable[..., Any]]) -> Callable[[Reader, str, Any], tuple[Any, Any]]:
    return lambda reader, key, value: reader.build_entry(table, value, key, {})


def _later(reader: Reader, key: str, value: Any) -> tuple[Any, Any]:
    """A device model, to be built once the number of clients is known."""
    target, name, rest = reader.named(DEVICES, value, key)
    arguments, resolved = reader.bind(target, rest, key, ("count",))
    return lambda count: reader.call(target, {**arguments, "count": count}, key), {"name": name, **resolved}


def _always() -> str:
    """Every client can be reached at any time."""
    return "always"


AVAILABILITY: dict[str, Callable[..., Any]] = {"always": _always}

NESTED: dict[str, Callable[[Reader, str, Any], tuple[Any, Any]]] = {
    "dataset": _dataset,
    "model": _model,
    "optimizer": lambda reader, key, value: (value, value),
    "device": _later,
    "availability": _from(AVAILABILITY),
    "aggregator": _from(AGGREGATORS),
    "attack": _from(ATTACKS),
    "compressor": _from(COMPRESSORS),
}


# Places ----------------------------------------------------------------------------------------------------------


def _device(name: str, reader: Reader) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise reader.error("runtime.device", f"unknown device {name!r}; use cpu, cuda, cuda:1 or auto") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise reader.error("runtime.device", f"{name!r} was asked for but no CUDA device is visible; use cpu or auto")
    return device


def _executor(runtime: Runtime, runner: StackRunner, width: int, device: torch.device) -> tuple[Executor, str]:
    several = device.type == "cuda" and torch.cuda.device_count() > 1
    ray = runtime.executor == "ray" or (runtime.executor == "auto" and (several or runtime.address is not None))
    workers: int | None = None if runtime.workers == "auto" else runtime.workers
    if ray:
        from fedsim.sim.ray_executor import RayExecutor

        executor = RayExecutor(
            runner,
            width=width,
            workers=workers,
            threads=runtime.threads,
            address=runtime.address,
        )
        return executor, f"{executor.num_workers} Ray actors, {runtime.threads} thread(s) each"
    if workers is None:
        workers = 1 if device.type == "cuda" else max(1, len(os.sched_getaffinity(0)) // runtime.threads)
    executor_here = InProcess(runner, width=width, workers=workers, threads=runtime.threads)
    return executor_here, f"{workers} thread(s) in this process, {runtime.threads} intra-op thread(s) each"


def _check_strategy(reader: Reader, strategy: Any, num_clients: int) -> None:
    """Refuse what is no strategy, a cohort larger than the federation, and a rule that can't take such a cohort."""
    for method in ("init", "round"):
        if not callable(getattr(strategy, method, None)):
            made = type(strategy).__name__
            raise reader.error(
                "strategy.name", f"{made} has no method {method}(); docs/tutorial.md shows what it needs"
            )
    size = getattr(strategy, "cohort_size", None)
    if size is not None and size > num_clients:
        raise reader.error(
            "strategy.cohort_size", f"{size} exceeds the {num_clients} clients; lower it or raise clients.count"
        )
    n = size or num_clients
    if hasattr(strategy, "cohort_size") and hasattr(strategy, "aggregator") and n <= MAX_TRIED:
        try:
            strategy.aggregator(torch.arange(n, dtype=torch.float32)[:, None], torch.ones(n))
        except ValueError as e:
            raise reader.error("strategy.aggregator", f"does not fit a cohort of {n}: {e}") from e


def _check_model(reader: Reader, module: nn.Module, data: FederatedData, loss: str) -> None:
    """Refuse a model that can't take the data or whose logits don't count its classes."""
    was_training = module.training
    try:
        with torch.no_grad():
            logits = module.eval()(data.inputs[:2])
    except Exception as e:
        shape = list(data.inputs.shape[1:])
        raise reader.error("task.model", f"can't take samples of shape {shape}: {type(e).__name__}: {e}") from e
    finally:
        module.train(was_training)
    expected = (*data.targets[:2].shape, data.num_classes)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if loss in LOSSES and found != expected:
        raise reader.error("task.model", f"gives {found} for 2 samples where {expected} is needed: a logit per class")


TABLES: dict[str, Mapping[str, Any]] = {
    "strategies": STRATEGIES,
    "optimizers": RULES,
    "aggregators": AGGREGATORS,
    "partitions": PARTITIONS,
    "datasets": DATASETS,
    "models": MODELS,
    "devices": DEVICES,
    "compressors": COMPRESSORS,
    "attacks": ATTACKS,
    "tasks": TASKS,
    "losses": LOSSES,
    "engines": ENGINES,
    "sinks": SINKS,
}
