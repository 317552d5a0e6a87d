"""A Flower client: a stack of one.

The same client halves that a simulator runs on hundreds of clients at once run here on one, on a device of its own.
Every message starts a process, so nothing lives between two messages but the client's memory, which is kept in
Flower's `Context.state`: it never leaves the device.

Letters: C = 1 client of the stack, P entries, M vectors that were sent to a client's inbox.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim.compress.packet import Packet
from fedsim.flower import wire
from fedsim.flower.downlink import Notebook, receive_copies
from fedsim.flower.wire import ABOUT, INBOX, LOGGED
from fedsim.memory import MemoryRows
from fedsim.sim.executor import Jobs, Results, StackRunner
from fedsim.sim.links import Uplink
from fedsim.streams import Streams

MEMORY, VERSION, COPIES = "fedsim.memory", "fedsim.version", "fedsim.copies"

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
        return Message(work(runner, book, message.content, context), reply_to=message)

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
    memory = recall(context.state, MEMORY)
    version = int(context.state[VERSION]["version"]) if VERSION in context.state else 0
    if version != head.version:
        raise ValueError(
            f"client {client} wrote its memory {version} times and the server knows of {head.version}: the node was "
            "started anew and its memory is gone, or the run was resumed. This strategy can't go on without it; start "
            "the run anew"
        )
    copies, broadcast = receive_copies(wire.read(content, book), recall(context.state, COPIES))
    results, reply = run(runner, head, broadcast, memory, inbox(content, broadcast))
    remember(context.state, COPIES, copies)
    if results.memory:
        version += 1
        remember(context.state, MEMORY, results.memory)
        context.state[VERSION] = ConfigRecord({"version": version})
    keys = [(runner.seed, client, head.number, 0), *reply.keys]
    out = wire.write(reply.values, book, keys)
    replace(head, version=version).write(out)
    out[LOGGED] = MetricRecord({k: float(v[0]) for k, v in results.metrics.items()})
    return out


@dataclass
class Reply:
    """What leaves the device: tensors, and packets before anybody decodes them.

    Args:
        values: by field.
        keys: of random numbers behind the uplink's packets.
    """

    values: dict[str, Any] = field(default_factory=dict)
    keys: list[wire.Key] = field(default_factory=list)


def run(
    runner: StackRunner,
    head: wire.Head,
    broadcast: Mapping[str, Any],
    memory: Mapping[str, Tensor],
    heard: Mapping[str, Tensor],
) -> tuple[Results, Reply]:
    """One job through the runner that the simulator uses, and its reply as it travels."""
    tap = Tap(runner.strategy, head.work, runner.uplink)
    here = replace(runner, strategy=tap, uplink=None if runner.uplink is None else tap)  # type: ignore[arg-type]
    jobs = Jobs(
        head.work,
        torch.tensor([head.client]),
        torch.tensor([head.number]),
        [broadcast],
        torch.zeros(1, dtype=torch.int64),
        {**memory, **heard},
        round=head.round,
    )
    results = here.run(jobs)
    return results, Reply({k: tap.packets.get(k, v) for k, v in results.fields.items()}, tap.keys)


class Tap:
    """Stands before a strategy and its uplink, and keeps the packets that the runner is about to decode.

    Args:
        strategy: the strategy.
        half: the method to be called.
        uplink: the uplink, or None.
    """

    def __init__(self, strategy: Any, half: str, uplink: Uplink | None) -> None:
        method = None if half.startswith("_") else getattr(strategy, half, None)
        if not callable(method):
            raise ValueError(
                f"{type(strategy).__name__} has no client half {half!r}; both ends need the same experiment file"
            )
        self.packets: dict[str, Packet] = {}
        self.keys: list[wire.Key] = []
        self._uplink, self._method = uplink, method
        setattr(self, half, self._call)

    def _call(self, *arguments: Any, **broadcast: Any) -> Mapping[str, Any]:
        reply: Mapping[str, Any] = self._method(*arguments, **broadcast)
        self.packets |= {k: v for k, v in reply.items() if isinstance(v, Packet)}
        return reply

    def encode(self, name: str, v: Tensor, memory: MemoryRows, streams: Streams) -> Packet:
        """As `Uplink.encode`."""
        assert self._uplink is not None
        book = Notebook(self._uplink.compressor)
        packet = replace(self._uplink, compressor=book).encode(name, v, memory, streams)  # type: ignore[arg-type]
        self.packets[name] = packet
        self.keys += [note.key for note in book.notes]
        return packet


def inbox(content: RecordDict, broadcast: dict[str, Any]) -> dict[str, Tensor]:
    """What peers sent, in the form that the runner takes; {} for work that is no exchange.

    Only vectors that reached this client travel. The others' rows are zero, so that all clients compute on arrays of
    one shape, as they do in a simulation, and get the same last bits.
    """
    if INBOX not in content:
        return {}
    record = content[INBOX]
    rows, total, own = torch.tensor(record["rows"], dtype=torch.int64), int(record["total"]), int(record["own"])
    for name in [k for k in broadcast if k.startswith("inbox/")]:
        vectors = broadcast[name]
        whole = vectors.new_zeros(total, *vectors.shape[1:])
        whole[rows] = vectors
        broadcast[name] = whole
    heard = torch.zeros(1, total, dtype=torch.bool)
    heard[0, rows] = True
    return {"inbox/heard": heard, "inbox/own": torch.tensor([own])}


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
