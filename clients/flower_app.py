"""A Flower client: a stack of one.

The same client halves that a simulator runs on hundreds of clients at once run here on one, on a device of its own.
Nothing lives between two messages but what the client keeps (`flower/kept.py`), which never leaves the device.

Letters: C = 1 client of the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, MessageType, MetricRecord, RecordDict

from fedsim.flower import wire
from fedsim.flower.downlink import receive_copies
from fedsim.flower.kept import Kept
from fedsim.flower.wire import ABOUT, LOGGED
from fedsim.sim.executor import Jobs, StackRunner
from fedsim.sim.links import step_of
from fedsim.terms import Terms

Build = Callable[[Context], tuple[StackRunner, wire.Book, Mapping[str, str]]]
"""What runs client halves here, the names of compressors, and {what: as which} of what the server must have as well
(`Door.agreed`), from the settings that a context holds."""


def answer(build: Build, kind: str, content: RecordDict, context: Context) -> RecordDict:
    """What a device says to a message of a kind: work that changes what it keeps, work that doesn't, or who it is.

    Args:
        build: called for every message.
        kind: train, evaluate or query.
        content: of the message.
        context: of the app; what the client keeps lies in its state, or where its node config says.
    """
    runner, book, agreed = build(context)
    if kind == MessageType.QUERY:
        num_examples = runner.task.num_examples
        client = partition(context, len(num_examples))
        about = ConfigRecord({"client": client, "num_examples": int(num_examples[client]), **agreed})
        return RecordDict({ABOUT: about})
    kept = Kept(context, wire.Head.read(content).run)
    said = work(runner, book, content, context, kept)
    if kind == MessageType.TRAIN:
        kept.save()
    return said


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


def work(runner: StackRunner, book: wire.Book, content: RecordDict, context: Context, kept: Kept) -> RecordDict:
    """Do one job, on what the client kept, and give it what is to be kept.

    Raises:
        ValueError: if the message is for another client, or the memory is gone with which the job begins.
        ClientError: if the client half raised.
    """
    head = wire.Head.read(content)
    client = partition(context, len(runner.task.num_examples))
    if client != head.client:
        raise ValueError(f"a job of client {head.client} reached client {client}; two nodes share a partition-id")
    memory, version = kept.memory(head.version), head.version
    check_half(runner.strategy, head.work)
    copies, broadcast = receive_copies(wire.read(content, book), kept.copies())
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
    kept.update(copies)
    if answer.memory:
        version = kept.remember(head, answer.memory)
    values = {k: v.dense() if isinstance(v, Terms) else v for k, v in answer.values.items()}
    keys = [(runner.seed, client, head.number, step) for step in (0, *map(step_of, values))]
    out = wire.write(values, book, keys)
    replace(head, version=version).write(out)
    out[LOGGED] = MetricRecord({k: float(v[0]) for k, v in answer.metrics.items()})
    return out


def check_half(strategy: Any, name: str) -> None:
    """Refuse to run what is no client half: the name came over the network."""
    if name.startswith("_") or not callable(getattr(strategy, name, None)):
        raise ValueError(
            f"{type(strategy).__name__} has no client half {name!r}; both ends need the same experiment file"
        )
