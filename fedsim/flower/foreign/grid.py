"""The grid that an app's ServerApp is given: messages and replies on a virtual clock.

A message is answered when it is pushed, and its reply arrives when its node's device would have it there: after the
download, the work and the upload of so many bits. A node does one message at a time. Time moves only where the app
waits: in `send_and_receive` to the last reply, or to its timeout; in `pull_messages` to the first reply, if none of
those that it asks for is there; where a strategy of Flower's waits for nodes, to the next coming or going of one. So an
app that polls finds the replies one after the other, in the order of their arrival, however fast it polls.

A node that is away is not among the ids, and a message to it, or one whose node leaves or drops out before its reply
has arrived, ends in Flower's error for nodes that are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from threading import RLock

from flwr.app import Error, Message

from fedsim.flower.foreign.clocks import Clocks
from fedsim.flower.foreign.nodes import NOTHING_KEPT, Answer, Job
from fedsim.flower.foreign.private import EXPIRED, UNAVAILABLE, OwnGrid, number, pack, unpack
from fedsim.flower.foreign.rounds import RoundLog
from fedsim.sim.absence import LOOKS


@dataclass(order=True)
class Arrival:
    """A reply on its way.

    Args:
        due: virtual second of its arrival.
        sequence: number of its message in the order of pushing; breaks ties.
        message: what it replies to.
        answer: what it says.
        up: bits of it that have been sent when it arrives.
    """

    due: float
    sequence: int
    message: Message = field(compare=False)
    answer: Answer = field(compare=False)
    up: int = field(compare=False)


class SimGrid(OwnGrid):
    """See the module's head.

    Args:
        answer: what a node answers to a message.
        clocks: when they can be reached, and how long their work takes.
        log: what has happened.
        told: called with the node and the reason of every error of an app.
    """

    def __init__(
        self,
        answer: Callable[[Job], Answer],
        clocks: Clocks,
        log: RoundLog,
        told: Callable[[int, str], None],
    ) -> None:
        super().__init__()
        self._answer, self._clocks, self._log, self._told = answer, clocks, log, told
        self.now = 0.0
        self.states = dict.fromkeys(range(1, clocks.count + 1), NOTHING_KEPT)
        self._jobs = dict.fromkeys(self.states, 0)
        self._free = dict.fromkeys(self.states, 0.0)  # virtual seconds at which nodes have done what they were sent
        self._count = 0
        self._waits = 0  # for nodes, since a message was pushed
        self._flying: list[Arrival] = []
        self._landed: dict[str, Message] = {}
        self._lock = RLock()  # an app may push and pull from threads

    def get_node_ids(self) -> Iterable[int]:
        with self._lock:
            return self._clocks.on_line([*self.states], self.now)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        with self._lock:
            return [self._push(message, first=k == 0) for k, message in enumerate(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            wanted = set(message_ids)
            if not wanted & self._landed.keys():
                due = [arrival.due for arrival in self._flying if arrival.message.metadata.message_id in wanted]
                self._pass(min(due, default=self.now))
            return self._take(wanted)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        with self._lock:
            wanted, end = set(self.push_messages(messages)), inf if timeout is None else self.now + timeout
            due = [arrival.due for arrival in self._flying if arrival.message.metadata.message_id in wanted]
            self._pass(min(max(due, default=self.now), end))
            return self._take(wanted)

    def wait_for_nodes(self) -> None:
        """Let time pass until a node comes or goes, for a strategy that needs more of them than there are.

        Raises:
            ValueError: if none does any more, or the strategy has waited for too long.
        """
        with self._lock:
            then, self._waits = self._clocks.next_change(self.now), self._waits + 1
            if then is None or self._waits > LOOKS:
                raise ValueError(
                    f"the strategy waits for more clients than the {len(list(self.get_node_ids()))} of "
                    f"{len(self.states)} that are there; raise clients.count or change clients.availability"
                )
            self._pass(then)

    def _push(self, message: Message, first: bool) -> str:
        """Let a node answer a message, the first of its push or not; the message's id. The reply is on its way."""
        meta = message.metadata
        self._waits = 0
        self._log.begin(message, first, self.now)
        self._count += 1
        number(message, str(self._count))
        node, start = meta.dst_node_id, max(self.now, self._free.get(meta.dst_node_id, self.now))
        if node in self.states and self._clocks.on_line([node], start):
            arrival = self._work(message, start)
        else:
            self._log.sent(0)
            arrival = Arrival(
                start, self._count, message, Answer(None, b"", UNAVAILABLE, f"node {node} is not there"), 0
            )
        if arrival.due > (end := self.now + meta.ttl):
            arrival = Arrival(end, self._count, message, Answer(None, b"", EXPIRED, "its time to live was over"), 0)
        self._flying.append(arrival)
        return str(meta.message_id)

    def _work(self, message: Message, start: float) -> Arrival:
        """The reply of a node that begins with a message at this second. What it keeps changes only if it replies."""
        meta, content = message.metadata, pack(message.content)
        node = meta.dst_node_id
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
        answer, down = self._answer(job), 8 * len(content)
        self._log.sent(down)
        up = 8 * len(answer.content or b"")
        ending = self._clocks.ending(node, job.number, meta.message_type, start, down, up)
        self._jobs[node], self._free[node] = job.number + 1, ending.at
        if not ending.well:
            answer = Answer(None, job.state, UNAVAILABLE, f"node {node} went away")
        elif answer.content is None:
            self._told(node, answer.reason)
        self.states[node] = answer.state
        return Arrival(ending.at, self._count, message, answer, ending.up)

    def _pass(self, until: float) -> None:
        """Let time pass; what is due by then arrives, in order."""
        self.now = max(self.now, until)
        due = sorted(arrival for arrival in self._flying if arrival.due <= self.now)
        self._flying = [arrival for arrival in self._flying if arrival.due > self.now]
        for arrival in due:
            answer, meta = arrival.answer, arrival.message.metadata
            content = None if answer.content is None else unpack(answer.content)
            self._log.came(meta.message_type, arrival.up, content, dropped=answer.code == UNAVAILABLE)
            told = Error(code=answer.code, reason=answer.reason) if content is None else content
            self._landed[meta.message_id] = number(Message(told, reply_to=arrival.message), f"{meta.message_id}r")

    def _take(self, wanted: set[str]) -> list[Message]:
        """Replies that have arrived to these messages, in the order of their arrival."""
        return [self._landed.pop(key) for key in list(self._landed) if key in wanted]

    def close(self) -> None:
        """The app is done: write its last round."""
        self._log.close(self.now)
