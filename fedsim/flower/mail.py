"""Jobs on their way to clients and their replies, over any Flower grid.

A grid's nodes have random 64-bit numbers; a client is known by the partition-id that its node was started with. Every
client has at most one job at a time.

Letters: N clients, P entries of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.compress.packet import Packet
from fedsim.flower import wire
from fedsim.flower.clock import WALL, Clock, Patience
from fedsim.graph import Inbox
from fedsim.sim.account import TOLERANCE, bits_of
from fedsim.sim.events import Sent
from fedsim.sim.executor import ClientError, Results

CPU = torch.device("cpu")
GONE = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""Errors that say that a node, and not what ran on it, is at fault: they cost its reply, and no more."""


@dataclass(frozen=True)
class Nodes:
    """The clients of a federation: the grid's number of each, and how many samples [N] it says it has."""

    node_ids: tuple[int, ...]
    num_examples: Tensor


@dataclass(frozen=True)
class Flight:
    """One job on its way: which of its client's jobs, the fleet's key of what it was sent, and when (in seconds)."""

    client: int
    number: int
    key: int
    started: float


@dataclass(frozen=True)
class Landed:
    """A reply that has come in: whose, when (in seconds), and what it holds."""

    flight: Flight
    at: float
    results: Results


@dataclass(frozen=True)
class Letter:
    """What one client is sent for a job, in an exchange with what its peers sent to it alone."""

    client: int
    number: int
    values: Mapping[str, Any]
    inbox: Inbox | None = None


@dataclass
class Mail:
    """What is on its way, and what has come in.

    Args:
        grid: Flower's.
        nodes: where each client is.
        book: names of compressors.
        clock: where seconds come from.
        patience: how long to wait for replies.
        device: where the server's tensors live.
        flights: jobs that have not been answered, and what they were sent, by message.
        landed: replies that nobody has taken yet, by client, in order of arrival.
        lost: jobs whose nodes are gone and that nobody has noted yet.
        versions: [N] how often each client has written its memory.
        took: [2, N] float64: seconds of all jobs of each client, and how many these were.
    """

    grid: Grid
    nodes: Nodes
    book: wire.Book
    clock: Clock = WALL
    patience: Patience = field(default_factory=Patience)
    device: torch.device = CPU
    flights: dict[str, tuple[Flight, Sent]] = field(default_factory=dict)
    landed: dict[int, Landed] = field(default_factory=dict)
    lost: list[Flight] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.nodes.node_ids)
        self.versions = torch.zeros(n, dtype=torch.int64)
        self.took = torch.zeros(2, n, dtype=torch.float64)
        self.start = self.clock.now()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.clock.now() - self.start

    def open_jobs(self) -> list[Flight]:
        """Jobs whose replies nobody has taken yet, in the order in which they were sent."""
        jobs = [*(flight for flight, _ in self.flights.values()), *(reply.flight for reply in self.landed.values())]
        return sorted(jobs, key=lambda flight: (flight.key, flight.client))

    def connected(self, clients: Sequence[int], at_least: int) -> list[bool]:
        """Which of these clients are connected, once at least so many are.

        Raises:
            ClientError: if there are fewer when patience is over.
        """
        start = self.now
        while True:
            there = set(self.grid.get_node_ids())
            on = [self.nodes.node_ids[client] in there for client in clients]
            if sum(on) >= at_least:
                return on
            if self.now - start > self.patience.reply_seconds:
                raise ClientError(
                    f"{sum(on)} of {len(on)} clients were connected within {self.patience.reply_seconds} seconds, and "
                    f"{at_least} are needed at once; start their SuperNodes"
                )
            self.clock.sleep(self.patience.poll_seconds)

    def post(self, sent: Sent, key: int, letters: Sequence[Letter], keys: Sequence[wire.Key] = ()) -> int:
        """Send the letters of one call; the bits of their values."""
        bits = 0
        contents, flights = [], []
        for letter in letters:
            content = wire.write(letter.values, self.book, keys)
            version = int(self.versions[letter.client])
            head = wire.Head(
                work=sent.work, client=letter.client, number=letter.number, round=sent.round, version=version
            )
            head.write(content)
            if letter.inbox is not None:
                bits += wire.write_inbox(content, letter.inbox)
            bits += sum(map(bits_of, letter.values.values()))
            contents.append((self.nodes.node_ids[letter.client], content))
            flights.append((Flight(letter.client, letter.number, key, self.now), sent))
        posted = push(self.grid, contents, MessageType.TRAIN, str(sent.round), self.patience.reply_seconds)
        self.flights |= dict(zip(posted, flights, strict=True))
        return bits

    def aside(self, sent: Sent, letters: Sequence[Letter]) -> dict[int, dict[str, Tensor]]:
        """{client: what it answers} to letters that are no jobs; of those that are there and answer in time.

        Raises:
            ClientError: if a client failed.
        """
        there = self.connected([letter.client for letter in letters], 0)
        letters = [letter for letter, on in zip(letters, there, strict=True) if on]
        contents = []
        for letter in letters:
            content = wire.write(letter.values, self.book)
            version = int(self.versions[letter.client])
            wire.Head(
                work=sent.work, client=letter.client, number=letter.number, round=sent.round, version=version
            ).write(content)
            contents.append((self.nodes.node_ids[letter.client], content))
        posted = push(self.grid, contents, MessageType.EVALUATE, str(sent.round), self.patience.reply_seconds)
        waiting, answers, start = dict(zip(posted, letters, strict=True)), dict[int, dict[str, Tensor]](), self.now
        while waiting:
            for message in self.grid.pull_messages(list(waiting)):
                client = waiting.pop(message.metadata.reply_to_message_id).client
                if message.has_error() and message.error.code in GONE:
                    continue
                values = wire.read(content_of(message, f"client {client}, {sent.work}"), self.book)
                answers[client] = {k: v for k, v in values.items() if isinstance(v, Tensor)}
            if self.now - start > self.patience.reply_seconds:
                break
            if waiting:
                self.clock.sleep(self.patience.poll_seconds)
        return answers

    def look(self) -> bool:
        """Take in replies; those of one look count as having come in the order of sending. True if any did."""
        messages = list(self.grid.pull_messages(list(self.flights))) if self.flights else []
        came = {m.metadata.reply_to_message_id: m for m in messages}
        for number in [n for n in self.flights if n in came]:
            flight, sent = self.flights.pop(number)
            if came[number].has_error() and came[number].error.code in GONE:
                self.lost.append(flight)
                continue
            self.landed[flight.client] = Landed(flight, self.now, self._open(flight, sent, came[number]))
            self.took[:, flight.client] += torch.tensor([self.now - flight.started, 1.0], dtype=torch.float64)
        return bool(messages)

    def wait(self, enough: Callable[[], bool], until: float = inf) -> None:
        """Take in replies until there are enough, or until a time.

        Raises:
            ClientError: if a client failed, or (without a time) nobody replied for too long.
        """
        last = self.now
        while not enough():
            last = self.now if self.look() else last
            if enough() or self.now >= until - TOLERANCE:
                break
            if until == inf and self.now - last > self.patience.reply_seconds:
                missing = sorted(self.flights.values(), key=lambda job: job[0].client)
                shown = ", ".join(f"{f.client} ({sent.work}, round {sent.round + 1})" for f, sent in missing)
                raise ClientError(f"no reply for {self.patience.reply_seconds} seconds from client(s) {shown}")
            self.clock.sleep(min(self.patience.poll_seconds, max(until - self.now, 0.0)))

    def forget(self, clients: Sequence[int]) -> list[Flight]:
        """Jobs of these clients, whose replies nobody waits for any more."""
        numbers = [n for n, (flight, _) in self.flights.items() if flight.client in clients]
        return [self.flights.pop(n)[0] for n in numbers]

    def _open(self, flight: Flight, sent: Sent, message: Message) -> Results:
        content = content_of(message, f"client {flight.client}, {sent.work} of round {sent.round + 1}")
        head = wire.Head.read(content)
        if (head.client, head.number, head.work) != (flight.client, flight.number, sent.work):
            raise ClientError(
                f"job {flight.number} of client {flight.client} ({sent.work}) was answered by job {head.number} of "
                f"client {head.client} ({head.work})"
            )
        self.versions[flight.client] = head.version
        values = wire.read(content, self.book)
        bits = sum(map(bits_of, values.values()))
        fields = {k: (v.decode() if isinstance(v, Packet) else v).to(self.device) for k, v in values.items()}
        logged = {k: torch.tensor([v], dtype=torch.float64) for k, v in content[wire.LOGGED].items()}
        return Results(fields, {}, {}, logged, torch.tensor([bits]))


def connect(grid: Grid, num_clients: int, clock: Clock, patience: Patience) -> Nodes:
    """Wait until every client has a node, and ask each how many samples it has.

    Raises:
        ClientError: if nodes are missing when patience is over, two say they are the same client, or one can't say
            which it is.
    """
    start = clock.now()
    known: set[int] = set()
    asked: dict[str, int] = {}
    found: dict[int, tuple[int, int]] = {}
    while True:
        new = sorted(set(grid.get_node_ids()) - known)
        known |= set(new)
        contents = [(node, RecordDict()) for node in new]
        asked |= dict(zip(push(grid, contents, MessageType.QUERY, "", patience.reply_seconds), new, strict=True))
        for message in grid.pull_messages(list(asked)) if asked else ():
            node = asked.pop(message.metadata.reply_to_message_id)
            about = content_of(message, f"node {node}")[wire.ABOUT]
            client = int(about["client"])
            if client in found:
                raise ClientError(f"nodes {found[client][0]} and {node} both have partition-id={client}")
            found[client] = node, int(about["num_examples"])
        if len(found) == num_clients:
            each = [found[i] for i in range(num_clients)]
            return Nodes(tuple(node for node, _ in each), torch.tensor([n for _, n in each], dtype=torch.int64))
        if clock.now() - start > patience.reply_seconds:
            missing = ", ".join(str(i) for i in range(num_clients) if i not in found)
            raise ClientError(
                f"no node with partition-id {missing} within {patience.reply_seconds} seconds; start a SuperNode for "
                "each, or lower clients.count"
            )
        clock.sleep(patience.poll_seconds)


def push(grid: Grid, contents: Iterable[tuple[int, RecordDict]], kind: str, group: str, seconds: float) -> list[str]:
    """Send (node, content) pairs and return the messages' numbers, in order.

    Raises:
        ClientError: if the grid takes one of them for too large or malformed.
    """
    messages = [Message(content, node, kind, ttl=seconds, group_id=group) for node, content in contents]
    ids = list(grid.push_messages(messages)) if messages else []
    if len(ids) != len(messages) or None in ids:
        raise ClientError(f"{len(messages)} messages were sent and the SuperLink took {len(ids) - ids.count(None)}")
    return ids


def content_of(message: Message, who: str) -> RecordDict:
    """The content of a reply.

    Raises:
        ClientError: if the client, or the network, answered with an error.
    """
    if message.has_error():
        raise ClientError(f"{who}: {message.error.reason} (Flower's error {message.error.code})")
    return message.content
