"""Jobs on their way to clients and their replies, over any Flower grid.

A grid's nodes have random 64-bit numbers; a client is known by the partition-id that its node was started with. Every
client has at most one job at a time.

Letters: N clients, P entries of a vector.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.flower import wire
from fedsim.flower.clock import WALL, Clock, Patience
from fedsim.flower.devices import Devices
from fedsim.flower.door import Door, Form, Forms, NotFinite, Refused, question
from fedsim.flower.nodes import GONE, Nodes, pull, push, reason
from fedsim.graph import Inbox
from fedsim.sim.account import TOLERANCE, bits_of
from fedsim.sim.events import Sent
from fedsim.sim.executor import ClientError, Results

CPU = torch.device("cpu")
ODD = Refused("it has not the fields, shapes and metrics that most replies to this work have")
How = Literal["dropped", "failed", "refused", "diverged"]
"""A job's end without a reply: its node is gone or silent, it raised, its reply is no such, or holds no numbers."""


@dataclass(frozen=True)
class Flight:
    """One job on its way: which of its client's jobs, the fleet's key of what it was sent, when (in seconds), and how
    many vectors of the model's size its reply holds at least."""

    client: int
    number: int
    key: int
    started: float
    vectors: int = 0


@dataclass(frozen=True)
class Landed:
    """A reply that has come in: whose, when (in seconds), what was sent, what it holds, and of what form that is; and
    the version of its client's memory with which its job began."""

    flight: Flight
    at: float
    sent: Sent
    results: Results
    form: Form
    version: int


@dataclass(frozen=True)
class Ended:
    """A job that ended without a reply that can be used: whose, how, and what is to be said of it."""

    flight: Flight
    how: How
    what: str


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
        door: what replies must pass.
        clock: where seconds come from.
        patience: how long to wait for replies.
        needs_all: whether a job is sent again when its node was gone and is back.
        device: where the server's tensors live.
        flights: jobs that have not been answered, and what they were sent, by message.
        contents: of these messages, if all replies are needed.
        absent: messages whose nodes were gone, to be sent again.
        landed: replies that nobody has taken yet, by client, in order of arrival.
        ended: jobs that ended without a reply and that nobody has noted yet.
        forms: which form replies to each question have had.
        run: the number of this run, by which devices keep what they remember.
        versions: [N] how often each client has written its memory.
        saved: [N] the same in the last checkpoint.
        devices: what is known of each.
    """

    grid: Grid
    nodes: Nodes
    door: Door
    clock: Clock = WALL
    patience: Patience = field(default_factory=Patience)
    device: torch.device = CPU
    needs_all: bool = False
    flights: dict[str, tuple[Flight, Sent]] = field(default_factory=dict)
    contents: dict[str, RecordDict] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    landed: dict[int, Landed] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    forms: Forms = field(default_factory=Forms)
    run: int = field(default_factory=lambda: secrets.randbits(63))

    def __post_init__(self) -> None:
        n = len(self.nodes.node_ids)
        self.versions, self.saved = torch.zeros(2, n, dtype=torch.int64)
        self.devices = Devices(n)
        self.start = self.clock.now()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.clock.now() - self.start

    def open_jobs(self) -> list[Flight]:
        """Jobs whose replies nobody has taken yet, in the order in which they were sent."""
        jobs = [*(flight for flight, _ in self.flights.values()), *(reply.flight for reply in self.landed.values())]
        return sorted(jobs, key=lambda flight: (flight.key, flight.client))

    def save(self) -> Tensor:
        """[N] versions for a checkpoint, which clients keep from now on; of an open job the one with which it began."""
        self.saved = self.versions.clone()
        for client, landed in self.landed.items():
            self.saved[client] = landed.version
        return self.saved

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

    def post(
        self, sent: Sent, key: int, letters: Sequence[Letter], keys: Sequence[wire.Key] = (), vectors: int = 0
    ) -> int:
        """Send the letters of one call; the bits of their values."""
        bits = 0
        contents, flights = [], []
        for letter in letters:
            content = wire.write(letter.values, self.door.book, keys)
            self._head(sent, letter).write(content)
            if letter.inbox is not None:
                bits += wire.write_inbox(content, letter.inbox)
            bits += sum(map(bits_of, letter.values.values()))
            contents.append((self.nodes.node_ids[letter.client], content))
            flights.append((Flight(letter.client, letter.number, key, self.now, vectors), sent))
        posted = push(self.grid, contents, MessageType.TRAIN, str(sent.round), self.patience.reply_seconds)
        self.flights |= dict(zip(posted, flights, strict=True))
        if self.needs_all:
            kept = dict(zip(posted, (content for _, content in contents), strict=True)) | self.contents
            self.contents = {number: content for number, content in kept.items() if number in self.flights}
        return bits

    def aside(self, sent: Sent, letters: Sequence[Letter]) -> dict[int, dict[str, Tensor]]:
        """{client: what it answers} to letters that are no jobs; of those that are there and answer in time."""
        there = self.connected([letter.client for letter in letters], 0)
        letters = [letter for letter, on in zip(letters, there, strict=True) if on]
        contents = []
        for letter in letters:
            content = wire.write(letter.values, self.door.book)
            self._head(sent, letter).write(content)
            contents.append((self.nodes.node_ids[letter.client], content))
        posted = push(self.grid, contents, MessageType.EVALUATE, str(sent.round), self.patience.reply_seconds)
        waiting, answers, start = dict(zip(posted, letters, strict=True)), dict[int, dict[str, Tensor]](), self.now
        while waiting:
            for number, message in pull(self.grid, waiting).items():
                letter = waiting.pop(number)
                if message.has_error():
                    if message.error.code not in GONE:
                        self._warn(self._failed(letter.client, sent, message))
                    continue
                try:
                    answers[letter.client] = self.door.scores(message.content, self._head(sent, letter), sent)
                except Refused as e:
                    self._warn(self._refused(letter.client, sent, e))
            if self.now - start > self.patience.reply_seconds:
                break
            if waiting:
                self.clock.sleep(self.patience.poll_seconds)
        forms = {client: tuple(sorted(answer)) for client, answer in answers.items()}
        for client, form in forms.items():
            self.forms.note(question(sent), form, client)
        for client in [c for c, form in forms.items() if not self.forms.usual(question(sent), form)]:
            del answers[client]
            self._warn(self._refused(client, sent, ODD))
        return answers

    def look(self) -> bool:
        """Take in replies; those of one look count as having come in the order of sending. True if any did."""
        self._send_again()
        came = pull(self.grid, [number for number in self.flights if number not in self.absent])
        for number in [n for n in self.flights if n in came]:
            (flight, sent), message = self.flights[number], came[number]
            gone = message.has_error() and message.error.code in GONE
            if self.needs_all and gone and self.now - flight.started <= self.patience.reply_seconds:
                self._warn(f"{self._failed(flight.client, sent, message)}; it is asked again when its node is back")
                self.absent.add(number)
                continue
            del self.flights[number]
            if message.has_error():
                self._lose(flight, sent, message)
                continue
            try:
                self._land(flight, sent, message.content)
            except Refused as e:
                self._refuse(flight, sent, e)
        for landed in list(self.landed.values()):
            if not self.forms.usual(question(landed.sent), landed.form):
                del self.landed[landed.flight.client]
                self._refuse(landed.flight, landed.sent, ODD)
        return bool(came)

    def wait(self, enough: Callable[[], bool], until: float = inf) -> None:
        """Take in replies until there are enough, or until a time.

        Without a time, those that are still silent when patience is over count as dropped.

        Raises:
            ClientError: if nobody but them was waited for.
        """
        last = self.now
        while not enough():
            last = self.now if self.look() else last
            if enough() or self.now >= until - TOLERANCE:
                break
            if until == inf and self.now - last > self.patience.reply_seconds:
                self._give_up()
                break
            self.clock.sleep(min(self.patience.poll_seconds, max(until - self.now, 0.0)))

    def forget(self, clients: Sequence[int]) -> list[Flight]:
        """Jobs of these clients, whose replies nobody waits for any more."""
        numbers = [n for n, (flight, _) in self.flights.items() if flight.client in clients]
        return [self.flights.pop(n)[0] for n in numbers]

    def _head(self, sent: Sent, to: Letter | Flight) -> wire.Head:
        return wire.Head(
            work=sent.work,
            client=to.client,
            number=to.number,
            round=sent.round,
            version=int(self.versions[to.client]),
            saved=int(self.saved[to.client]),
            run=self.run,
        )

    def _send_again(self) -> None:
        """Ask those again whose nodes were gone and are back: a job that runs twice gives the same."""
        there = set(self.grid.get_node_ids()) if self.absent else set()
        self.absent &= self.flights.keys()
        for number in sorted(self.absent):
            flight, sent = self.flights[number]
            if (node := self.nodes.node_ids[flight.client]) in there:
                content, seconds = self.contents.pop(number), self.patience.reply_seconds
                (new,) = push(self.grid, [(node, content)], MessageType.TRAIN, str(sent.round), seconds)
                self.flights[new], self.contents[new] = self.flights.pop(number), content
                self.absent.remove(number)

    def _give_up(self) -> None:
        """Take jobs in flight for lost, unless nobody else's reply is there to go on with."""
        missing = sorted(self.flights.values(), key=lambda job: job[0].client)
        shown = ", ".join(f"{flight.client} ({sent.work}, round {sent.round + 1})" for flight, sent in missing)
        what = f"no reply for {self.patience.reply_seconds} seconds from client(s) {shown}"
        if not self.landed:
            raise ClientError(what)
        if not self.needs_all:
            self._warn(f"{what}; going on without")
        for flight, _ in missing:
            self._end(flight, "dropped", what)
        self.flights.clear()

    def _land(self, flight: Flight, sent: Sent, content: RecordDict) -> None:
        client = flight.client
        has = int(self.nodes.num_examples[client])
        opened = self.door.reply(content, self._head(sent, flight), sent, flight.vectors, has)
        before, self.versions[client] = int(self.versions[client]), opened.version
        self.forms.note(question(sent), opened.form, client)
        fields = {k: v.to(self.device) for k, v in opened.results.fields.items()}
        results = replace(opened.results, fields=fields)
        self.landed[client] = Landed(flight, self.now, sent, results, opened.form, before)

    def _lose(self, flight: Flight, sent: Sent, message: Message) -> None:
        """Note a job that was answered with an error."""
        what = self._failed(flight.client, sent, message)
        gone = message.error.code in GONE
        if not gone:
            self._warn(what)
        self._end(flight, "dropped" if gone else "failed", what)

    def _end(self, flight: Flight, how: Literal["dropped", "failed"], what: str) -> None:
        self.devices.count(flight.client, how)
        self.ended.append(Ended(flight, how, what))

    def _refuse(self, flight: Flight, sent: Sent, why: Refused) -> None:
        """Note a job whose reply did not pass."""
        what = self._refused(flight.client, sent, why)
        self._warn(what)
        self.ended.append(Ended(flight, "diverged" if isinstance(why, NotFinite) else "refused", what))

    def _failed(self, client: int, sent: Sent, message: Message) -> str:
        return f"{self._who(client, sent)}: {reason(message)}"

    def _refused(self, client: int, sent: Sent, why: Refused) -> str:
        count = self.devices.count(client, "refused")
        return f"{self._who(client, sent)}: its reply is refused, {why} ({count} of its replies so far)"

    def _who(self, client: int, sent: Sent) -> str:
        return f"client {client} (node {self.nodes.node_ids[client]}), {sent.work} of round {sent.round + 1}"

    def _warn(self, what: str) -> None:
        """Say whose reply goes unused, and why."""
        warnings.warn(what, stacklevel=2)
