"""A Flower client: a stack of one.

The same client halves that a simulator runs on hundreds of clients at once run here on one, on a device of its own.
Every message starts a process, so nothing lives between two messages but the client's memory, which is kept in
Flower's `Context.state`: it never leaves the device. That state ends with the run, and with the SuperNode; a node that
was started with `fedsim-memory=FOLDER` keeps a copy in a file there, from which it goes on.

Letters: C = 1 client of the stack, P entries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedsim.config import ConfigError
from fedsim.files import write_tensors
from fedsim.flower import wire
from fedsim.flower.downlink import receive_copies
from fedsim.flower.wire import ABOUT, LOGGED
from fedsim.sim.executor import Jobs, StackRunner
from fedsim.sim.links import step_of
from fedsim.terms import Terms

MEMORY, VERSION, COPIES = "fedsim.memory", "fedsim.version", "fedsim.copies"
BEFORE = "fedsim.before"  # the memory before the last job that wrote to it
KEPT = (MEMORY, BEFORE, COPIES)
FOLDER = "fedsim-memory"  # the node's setting

Build = Callable[[Context], tuple[StackRunner, wire.Book]]
"""What runs client halves here, and the names of compressors, from the settings that a context holds."""


def client_app(build: Build) -> ClientApp:
    """The app that a SuperNode runs.

    Args:
        build: called for every message; Flower starts a process for each.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        runner, book = build(context)
        recover(message.content, context)
        answer = work(runner, book, message.content, context)
        store(context)
        return Message(answer, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        runner, book = build(context)
        recover(message.content, context)
        forgotten = copy.copy(context)
        forgotten.state = RecordDict(dict(context.state))
        return Message(work(runner, book, message.content, forgotten), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        runner, _ = build(context)
        num_examples = runner.task.num_examples
        client = partition(context, len(num_examples))
        about = ConfigRecord({"client": client, "num_examples": int(num_examples[client])})
        return Message(RecordDict({ABOUT: about}), reply_to=message)

    return app


def partition(context: Context, num_clients: int) -> int:
    """Which client this node is.

    Raises:
        ValueError: if the node was started without a partition-id, or with one that the experiment does not have.
    """
    value = context.node_config.get("partition-id")
    if not isinstance(value, int):
        raise ValueError(
            f"this node has no partition-id (its node config is {dict(context.node_config)}); start it with "
            '--node-config "partition-id=0", each node with its own number'
        )
    if not 0 <= value < num_clients:
        raise ValueError(
            f"partition-id={value} is not one of the experiment's {num_clients} clients 0..{num_clients - 1}; give "
            "the node another one, or raise clients.count"
        )
    return value


def work(runner: StackRunner, book: wire.Book, content: RecordDict, context: Context) -> RecordDict:
    """Do one job and keep what the client half wrote to its memory.

    Raises:
        ValueError: if the message is for another client, or the client's memory is not the one the server knows of.
        ClientError: if the client half raised.
    """
    head = wire.Head.read(content)
    client = partition(context, len(runner.task.num_examples))
    if client != head.client:
        raise ValueError(f"a job of client {head.client} reached client {client}; two nodes share a partition-id")
    version = int(context.state[VERSION]["version"]) if VERSION in context.state else 0
    if BEFORE in context.state and version == head.version + 1:
        version = undo(context.state, head.version)
    memory = recall(context.state, MEMORY)
    if version != head.version:
        raise ValueError(
            f"client {client} wrote its memory {version} times and the server knows of {head.version}: the node was "
            "started anew and its memory is gone, or the run was resumed. This strategy can't go on without it; start "
            "the run anew"
        )
    check_half(runner.strategy, head.work)
    copies, broadcast = receive_copies(wire.read(content, book), recall(context.state, COPIES))
    jobs = Jobs(
        head.work,
        torch.tensor([head.client]),
        torch.tensor([head.number]),
        [broadcast],
        torch.zeros(1, dtype=torch.int64),
        memory,
        round=head.round,
        inbox=wire.read_inbox(content),
    )
    answer = runner.answer(jobs)
    remember(context.state, COPIES, copies)
    if answer.memory:
        version += 1
        context.state[BEFORE] = context.state[MEMORY] if MEMORY in context.state else ArrayRecord()
        remember(context.state, MEMORY, answer.memory)
        context.state[VERSION] = ConfigRecord({"version": version})
    values = {k: v.dense() if isinstance(v, Terms) else v for k, v in answer.values.items()}
    keys = [(runner.seed, client, head.number, step) for step in (0, *map(step_of, values))]
    out = wire.write(values, book, keys)
    replace(head, version=version).write(out)
    out[LOGGED] = MetricRecord({k: float(v[0]) for k, v in answer.metrics.items()})
    return out


def undo(state: RecordDict, version: int) -> int:
    """Forget what the last job wrote, whose reply the server never took: it was late, or lost. The version then."""
    state[MEMORY] = state.pop(BEFORE)
    state[VERSION] = ConfigRecord({"version": version})
    return version


def check_half(strategy: Any, name: str) -> None:
    """Refuse to run what is no client half: the name came over the network."""
    if name.startswith("_") or not callable(getattr(strategy, name, None)):
        raise ValueError(
            f"{type(strategy).__name__} has no client half {name!r}; both ends need the same experiment file"
        )


def recall(state: RecordDict, kind: str) -> dict[str, Tensor]:
    """Rows that this client kept."""
    if kind not in state:
        return {}
    rows = {k: wire.of_array(a, wire.Book({})) for k, a in state[kind].items()}
    return {k: v for k, v in rows.items() if isinstance(v, Tensor)}


def remember(state: RecordDict, kind: str, rows: Mapping[str, Tensor]) -> None:
    """Keep rows until the next message, beside those that are kept already."""
    if rows:
        old = dict(state[kind]) if kind in state else {}
        state[kind] = ArrayRecord(old | {k: wire.raw_array(v) for k, v in rows.items()})


def recover(content: RecordDict, context: Context) -> None:
    """Take what this client remembers from its file, where Flower's own state begins anew in the middle of a run.

    Raises:
        ConfigError: if the file cannot be read.
    """
    path, expected = _file(context), wire.Head.read(content).version
    if path is None or VERSION in context.state or not expected or not path.exists():
        return  # a run whose server knows of no memory begins without one
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{path} cannot be read ({e}); remove it and start the run anew") from e
    version = int(found.pop(VERSION))
    for kind in KEPT:
        prefix = kind + "/"
        remember(context.state, kind, {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
    context.state[VERSION] = ConfigRecord({"version": version})


def store(context: Context) -> None:
    """Keep a copy of what this client remembers in its file, if it was given a folder for it.

    Raises:
        OSError: if it cannot be written.
    """
    path = _file(context)
    if path is None or VERSION not in context.state:
        return
    rows = {f"{kind}/{k}": v for kind in KEPT for k, v in recall(context.state, kind).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {**rows, VERSION: torch.tensor(int(context.state[VERSION]["version"]))})


def _file(context: Context) -> Path | None:
    """Where this client keeps what it remembers."""
    folder = context.node_config.get(FOLDER)
    return None if not folder else Path(str(folder)) / f"client-{context.node_config['partition-id']}.safetensors"
