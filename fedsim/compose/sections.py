"""What the sections of an experiment file may hold, beside the entries of tables.

A field is a key of the file and its default the file's default; `fedsim.config.decode` checks the types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.compress.sparsify import Identity
from fedsim.config import Call, ConfigError, FromTable
from fedsim.data.checks import check_fraction
from fedsim.engine import ENGINES
from fedsim.evaluation import Evaluate
from fedsim.experiment import Checkpoint
from fedsim.sim.absence import Dropout
from fedsim.streams import server_rng
from fedsim.task import Schedule


@dataclass(frozen=True, kw_only=True)
class ByzantineClients:
    """Clients that attack.

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
            found = sorted(set(self.ids))
            if len(found) == num_clients:
                raise ValueError(f"ids: must leave at least one honest client of {num_clients}, got all of them")
            return torch.tensor(found, dtype=torch.int64)
        if not 0 <= self.count < num_clients:
            raise ValueError(f"count must leave at least one honest client of {num_clients}, got {self.count}")
        picked = server_rng(seed, "byzantine").choice(num_clients, size=self.count, replace=False)
        return torch.from_numpy(np.sort(picked))


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Who takes part.

    Args:
        count: N; null takes it from the data (a natural partition) or is 100.
        devices: how fast they are.
        availability: when they can be reached. A job whose client goes off line dies.
        dropout: jobs that die by themselves.
        byzantine: who attacks, and how.
    """

    count: int | None = None
    devices: Annotated[Any, FromTable("device", "constant")] = None
    availability: Annotated[Any, FromTable("availability", "always")] = None
    dropout: Dropout = field(default_factory=Dropout)
    byzantine: ByzantineClients = field(default_factory=ByzantineClients)

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
    optimizer: Annotated[Any, FromTable("optimizer", {"name": "sgd", "lr": 0.05})] = None

    def schedule(self) -> Schedule:
        epochs = 1 if self.epochs is None and self.steps is None else self.epochs
        size = None if self.batch_size == "full" else self.batch_size
        return Schedule(epochs=epochs, steps=self.steps, batch_size=size, shuffle=self.shuffle)


@dataclass(frozen=True, kw_only=True)
class Up:
    """What clients send.

    Args:
        compressor: for every vector of a reply.
        error_feedback: add to each message what earlier ones left out; a rule that expands (rand_k) is then scaled.
    """

    compressor: Annotated[Any, FromTable("compressor", "identity")] = None
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.compressor, Identity) and self.error_feedback:
            raise ConfigError("uplink.error_feedback: needs an uplink.compressor that leaves something out")


@dataclass(frozen=True, kw_only=True)
class Down:
    """What clients receive: the change of a model-sized vector since the last message is compressed.

    A rule that expands (rand_k) is scaled.

    Args:
        compressor: for every such change.
    """

    compressor: Annotated[Any, FromTable("compressor", "identity")] = None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where a run computes. Engine, stack, stacks, threads, precision and device are part of what fixes its bits.

    Args:
        executor: in_process, ray, torchrun, or auto: torchrun where it started the run, else in process on one device
            and Ray with several GPUs or an address.
        workers: stacks that run side by side (in each rank of a torchrun); auto is one per core, or one per GPU.
        threads: intra-op threads of each worker.
        address: of a Ray cluster: "auto", "host:port", or null.
        collectives: how workers in several processes fold: by gloo, by nccl (GPUs), through Ray's object_store, or
            auto: nccl between GPUs, else gloo.
        timeout_seconds: after which a Ray worker that is busy with one group of stacks counts as hung and is replaced.
        device: cpu, cuda, cuda:1 (that card alone, in process), or auto: cuda where a GPU is visible.
        stack: clients of a stack at most, or auto: a rule on model, sizes and device (`fedsim tune` measures).
        stacks: into how many a cohort is cut at least, or auto: with `stack: auto` as many as the workers need, else 1.
        engine: loop, stacked, compiled, pkg.module:name, or auto.
        native: whether the stacked engine takes a classifier's last layer and loss in C++ (on a CPU), or auto.
        graphs: whether a step on a GPU is captured as a CUDA graph and replayed in one launch, which rounds otherwise;
            or auto: with engine loop or stacked.
        precision: of products; storage is float32.
        data: where the samples lie beside a GPU: device (all of them on it), host (in RAM, from where minibatches are
            copied ahead of the steps), or auto: the device if they take a quarter of it at most.
        memory: where clients' rows are kept between rounds: ram, disk (a file in the run's folder), device (where
            stacks of this process are computed), or auto: the first of device, ram and disk that surely has room.
    """

    executor: Literal["auto", "in_process", "ray", "torchrun"] = "auto"
    workers: int | Literal["auto"] = "auto"
    threads: int = 1
    address: str | None = None
    collectives: Literal["auto", "object_store", "gloo", "nccl"] = "auto"
    timeout_seconds: float = 1800.0
    device: str = "auto"
    stack: int | Literal["auto"] = "auto"
    stacks: int | Literal["auto"] = "auto"
    engine: str = "auto"
    native: bool | Literal["auto"] = "auto"
    graphs: bool | Literal["auto"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    data: Literal["auto", "device", "host"] = "auto"
    memory: Literal["auto", "device", "ram", "disk"] = "auto"

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "stack", "stacks"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1 or auto, got {value}")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {self.timeout_seconds}")
        if self.address is not None and self.executor in ("in_process", "torchrun"):
            raise ValueError(
                f"address={self.address} is a Ray cluster's, and executor={self.executor} joins none; leave it "
                "out (null), or take ray or auto"
            )
        if self.engine not in ("auto", *ENGINES) and ":" not in self.engine:
            raise ConfigError(
                f"runtime.engine: must be one of auto, {', '.join(ENGINES)}, or pkg.module:name, got {self.engine!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data.

    Args:
        root: where data sets lie: a folder to look in first.
        client_test: the share of each client's samples that it does not train on, so that its own model is evaluated
            on them (`personal_accuracy`).
    """

    root: str | None = None
    client_test: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("client_test", self.client_test)


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where rows go.

    Args:
        sinks: a list of entries, each with settings of its own; metrics.jsonl is always written.
    """

    sinks: Annotated[Any, FromTable("sinks", ("jsonl",))] = None


@dataclass(frozen=True, kw_only=True)
class File:
    """A whole file. What waits for more than the file holds is a call: the task, the strategy, and inside sections.

    Args:
        task: what clients work on: a model, its loss and the data.
        strategy: the algorithm.
        seed: of every random number of the run.
        rounds: server steps at most.
        stop: what ends the run before.
        runtime: where and how it computes.
        clients: who takes part.
        data: where data lie, and what clients hold out.
        partition: how data are cut over clients.
        local: local training.
        uplink: what clients send.
        downlink: what clients receive.
        evaluate: when and what to evaluate.
        checkpoint: when to save.
        allow_divergence: go on when the model is not finite any more.
        log: where metrics go.
    """

    task: Annotated[Call, FromTable("task", "classification")]
    strategy: Annotated[Call, FromTable("strategy", "fedavg")]
    seed: int = 0
    rounds: int = 100
    stop: Annotated[Any, FromTable("stop", {})] = None
    runtime: Runtime
    clients: Clients
    data: Data
    partition: Annotated[Any, FromTable("partition", "iid")]
    local: Local
    uplink: Up
    downlink: Down
    evaluate: Evaluate
    checkpoint: Checkpoint
    allow_divergence: bool = False
    log: Log

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds: must be at least 1, got {self.rounds}")
