"""The grid that an app's ServerApp is given: messages and replies on a virtual clock.

A message is answered when it is pushed, and its reply arrives when its node's device would have it there: after the
download, the work and the upload of so many bits. A node does one message at a time. Time moves only where the app
waits: in `send_and_receive` to the last reply, or to its timeout; in `pull_messages` to the first reply, if none of
those that it asks for is there. So an app that polls finds the replies one after the other, in the order of their
arrival, however fast it polls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from threading import RLock

import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.flower.foreign.book import Book
from fedsim.flower.foreign.nodes import NOTHING_KEPT, Answer, Job, Nodes
from fedsim.flower.foreign.private import EXPIRED, UNAVAILABLE, Run, begin_run, number, pack, unpack
from fedsim.sim.devices import Devices
from fedsim.streams import Streams


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a message's work counts as, in steps of its node's device.

    Args:
        train, evaluate, query: of a message of this kind.
    """

    train: int = 1
    evaluate: int = 0
    query: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "evaluate", "query"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more steps, got {getattr(self, name)}")

    def of(self, message_type: str) -> int:
        """Of a message of this type, such as `train` or `train.action`."""
        kinds = {"train": self.train, "evaluate": self.evaluate, "query": self.query}
        return kinds.get(message_type.partition(".")[0], 0)


@dataclass(order=True)
class Flight:
    """A reply on its way.

    Args:
        due: virtual second of its arrival.
        sequence: number of its message in the order of pushing; breaks ties.
        message: what it replies to.
        answer: what it says.
    """

    due: float
    sequence: int
    message: Message = field(compare=False)
    answer: Answer = field(compare=False)


class SimGrid(Grid):
    """See the module's head.

    Args:
        nodes: the clients.
        devices: how long their work takes.
        steps: what it counts as.
        book: what has happened.
        seed: of the run.
        told: called with the node and the reason of every error of an app.
    """

    def __init__(
        self, nodes: Nodes, devices: Devices, steps: Steps, book: Book, seed: int, told: Callable[[int, str], None]
    ) -> None:
        self._run = begin_run()
        self._nodes, self._devices, self._steps, self._book, self._seed = nodes, devices, steps, book, seed
        self._told = told
        self.now = 0.0
        self.states = dict.fromkeys(range(1, nodes.count + 1), NOTHING_KEPT)
        self._jobs = dict.fromkeys(self.states, 0)
        self._free = dict.fromkeys(self.states, 0.0)  # virtual seconds at which nodes have done what they were sent
        self._count = 0
        self._flying: list[Flight] = []
        self._landed: dict[str, Message] = {}
        self._lock = RLock()  # an app may push and pull from threads

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.states)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        with self._lock:
            return [self._push(message, first=k == 0) for k, message in enumerate(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            wanted = set(message_ids)
            if not wanted & self._landed.keys():
                due = [flight.due for flight in self._flying if flight.message.metadata.message_id in wanted]
                self._pass(min(due, default=self.now))
            return self._take(wanted)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        with self._lock:
            wanted, end = set(self.push_messages(messages)), inf if timeout is None else self.now + timeout
            due = [flight.due for flight in self._flying if flight.message.metadata.message_id in wanted]
            self._pass(min(max(due, default=self.now), end))
            return self._take(wanted)

    def _push(self, message: Message, first: bool) -> str:
        """Let a node answer a message, the first of its push or not; the message's id. The reply is on its way."""
        meta = message.metadata
        self._book.begin(message, first, self.now)
        self._count += 1
        number(message, str(self._count))
        content, node = pack(message.content), meta.dst_node_id
        self._book.sent(len(content))
        if node not in self.states:
            answer, due = Answer(None, b"", UNAVAILABLE, f"there is no node {node}"), self.now
        else:
            job = Job(
                node=node,
                number=self._jobs[node],
                message_id=meta.message_id,
                message_type=meta.message_type,
                group_id=meta.group_id,
                ttl=meta.ttl,
                content=content,
                state=self.states[node],
            )
            answer = self._nodes.answer(job)
            due = self._finish(job, answer)
            self._jobs[node], self._free[node], self.states[node] = job.number + 1, due, answer.state
            if answer.content is None:
                self._told(node, answer.reason)
            if due > self.now + meta.ttl:
                answer, due = Answer(None, b"", EXPIRED, "its time to live was over"), self.now + meta.ttl
        self._flying.append(Flight(due, self._count, message, answer))
        return str(meta.message_id)

    def _finish(self, job: Job, answer: Answer) -> float:
        """Virtual second at which a job's reply arrives."""
        one = torch.tensor([job.node - 1])
        seconds = self._devices.seconds(
            Streams(self._seed, one, torch.tensor([job.number])),
            torch.tensor([self._steps.of(job.message_type)], dtype=torch.float64),
            torch.tensor([8.0 * len(job.content)], dtype=torch.float64),
            torch.tensor([8.0 * len(answer.content or b"")], dtype=torch.float64),
        )
        return max(self.now, self._free[job.node]) + float(seconds)

    def _pass(self, until: float) -> None:
        """Let time pass; what is due by then arrives, in order."""
        self.now = max(self.now, until)
        due = sorted(flight for flight in self._flying if flight.due <= self.now)
        self._flying = [flight for flight in self._flying if flight.due > self.now]
        for flight in due:
            answer, meta = flight.answer, flight.message.metadata
            content = None if answer.content is None else unpack(answer.content)
            self._book.came(meta.message_type, len(answer.content or b""), content)
            told = Error(code=answer.code, reason=answer.reason) if content is None else content
            reply = number(Message(told, reply_to=flight.message), f"{meta.message_id}r")
            self._landed[meta.message_id] = reply

    def _take(self, wanted: set[str]) -> list[Message]:
        """Replies that have arrived to these messages, in the order of their arrival."""
        return [self._landed.pop(key) for key in list(self._landed) if key in wanted]

    def close(self) -> None:
        """The app is done: write its last round."""
        self._book.close(self.now)
