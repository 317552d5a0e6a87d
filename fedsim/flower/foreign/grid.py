"""The grid that an app's ServerApp is given: messages and replies on a virtual clock.

A message is answered when it is pushed, together with the others of its push, and its reply arrives when its node's
device would have it there: after the download, the work and the upload of so many bits. A node does one message at a
time. Time moves only where the app waits: in `send_and_receive` to the last reply, or to its timeout; in
`pull_messages` to the first reply, if none of those that it asks for is there; where a strategy of Flower's waits for
nodes, to the next coming or going of one. So an app that polls finds the replies one after the other, in the order of
their arrival, however fast it polls.

A node that is away is not among the ids, and a message to it, or one whose node leaves or drops out before its reply
has arrived, ends in Flower's error for nodes that are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import inf
from threading import RLock

from flwr.app import Error, Message

from fedsim.flower.foreign.channel import Channel
from fedsim.flower.foreign.clocks import Booking, Clocks
from fedsim.flower.foreign.nodes import NOTHING_KEPT, Answer, Answering, Job
from fedsim.flower.foreign.private import EXPIRED, UNAVAILABLE, OwnGrid, number, pack, unpack
from fedsim.flower.foreign.rounds import RoundLog
from fedsim.sim.absence import LOOKS


@dataclass(frozen=True)
class Posted:
    """A message that was pushed.

    Args:
        sequence: its number in the order of pushing.
        message: as the app made it.
        content: its record as it was then.
        first: of its push.
    """

    sequence: int
    message: Message
    content: bytes
    first: bool

    @property
    def node(self) -> int:
        """Where it goes."""
        return int(self.message.metadata.dst_node_id)


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
        answers: what nodes answer to messages.
        clocks: when they can be reached, and how long their work takes.
        log: what has happened.
        complain: called with the node and the reason of every error of an app.
        channel: what records become on their way; None if nothing.
    """

    def __init__(
        self,
        answers: Answering,
        clocks: Clocks,
        log: RoundLog,
        complain: Callable[[int, str], None],
        channel: Channel | None = None,
    ) -> None:
        super().__init__()
        self._channel = channel or Channel()
        self._answers, self._clocks, self.log, self._complain = answers, clocks, log, complain
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
            self._waits, ids = 0, list[str]()
            for batch in _no_node_twice(self._posted(messages)):
                self._send(batch)
                ids += [str(posted.sequence) for posted in batch]
            return ids

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

    def _posted(self, messages: Iterable[Message]) -> Iterator[Posted]:
        """Messages with their numbers, and with what they hold when the app has made them."""
        content = b""
        for k, message in enumerate(messages):
            self._count += 1
            now = pack(message.content)
            content = content if now == content else now  # one object for what all clients are sent
            yield Posted(self._count, number(message, str(self._count)), content, first=k == 0)

    def _send(self, batch: list[Posted]) -> None:
        """Let nodes answer messages; the replies are on their way."""
        starts = {posted.node: max(self.now, self._free.get(posted.node, self.now)) for posted in batch}
        there = self._there(starts)
        going = [posted for posted in batch if posted.node in there]
        told = self._channel.down([posted.node for posted in going], [posted.content for posted in going])
        bits = {posted.node: each.bits for posted, each in zip(going, told, strict=True)}
        for posted in batch:
            self.log.begin(posted.message, posted.first, self.now)
            self.log.sent(bits.get(posted.node, 0))
            if posted.node not in there:
                nobody = Answer(None, b"", UNAVAILABLE, f"node {posted.node} is not there")
                self._flying.append(self._arrival(posted, starts[posted.node], nobody, 0))
        jobs = [self._job(posted, each.content) for posted, each in zip(going, told, strict=True)]
        said = [self._channel.up(job, answer) for job, answer in zip(jobs, self._answers(jobs), strict=True)]
        bookings = [
            Booking(job.node, job.number, job.message_type, starts[job.node], bits[job.node], each.bits)
            for job, each in zip(jobs, said, strict=True)
        ]
        arrivals = []
        for posted, job, each, end in zip(going, jobs, said, self._clocks.endings(bookings), strict=True):
            self._jobs[job.node], self._free[job.node] = job.number + 1, end.at
            answer = each.answer
            if not end.well:
                answer = Answer(None, job.state, UNAVAILABLE, f"node {job.node} went away")
            elif answer.content is None:
                self._complain(job.node, answer.reason)
            else:
                self._channel.arrived(job.node, each)
            self.states[job.node] = answer.state  # changes only if it replies
            arrivals.append(self._arrival(posted, end.at, answer, end.up))
        delivered = self._channel.attacked(jobs, [arrival.answer for arrival in arrivals], self.log.round)
        for arrival, answer in zip(arrivals, delivered, strict=True):
            silent = answer.content is None and arrival.answer.content is not None
            self._flying.append(replace(arrival, answer=answer, up=0 if silent else arrival.up))

    def _there(self, starts: dict[int, float]) -> set[int]:
        """The nodes that can be reached when they would begin with their messages."""
        nodes: dict[float, list[int]] = {}
        for node, start in starts.items():
            if node in self.states:
                nodes.setdefault(start, []).append(node)
        return {node for start, some in nodes.items() for node in self._clocks.on_line(some, start)}

    def _job(self, posted: Posted, content: bytes) -> Job:
        meta = posted.message.metadata
        return Job(
            node=posted.node,
            number=self._jobs[posted.node],
            message_id=meta.message_id,
            message_type=meta.message_type,
            group_id=meta.group_id,
            ttl=meta.ttl,
            content=content,
            state=self.states[posted.node],
        )

    def _arrival(self, posted: Posted, due: float, answer: Answer, up: int) -> Arrival:
        """A reply, or an error in its place, on its way; another error if the message's time to live ends before."""
        if due > (end := self.now + posted.message.metadata.ttl):
            expired = Answer(None, b"", EXPIRED, "its time to live was over")
            return Arrival(end, posted.sequence, posted.message, expired, 0)
        return Arrival(due, posted.sequence, posted.message, answer, up)

    def _pass(self, until: float) -> None:
        """Let time pass; what is due by then arrives, in order."""
        self.now = max(self.now, until)
        due = sorted(arrival for arrival in self._flying if arrival.due <= self.now)
        self._flying = [arrival for arrival in self._flying if arrival.due > self.now]
        for arrival in due:
            answer, meta = arrival.answer, arrival.message.metadata
            content = None if answer.content is None else unpack(answer.content)
            self.log.came(meta.message_type, arrival.up, content, dropped=answer.code == UNAVAILABLE)
            told = Error(code=answer.code, reason=answer.reason) if content is None else content
            self._landed[meta.message_id] = number(Message(told, reply_to=arrival.message), f"{meta.message_id}r")

    def _take(self, wanted: set[str]) -> list[Message]:
        """Replies that have arrived to these messages, in the order of their arrival."""
        return [self._landed.pop(key) for key in list(self._landed) if key in wanted]

    def close(self) -> None:
        """The app is done: write its last round."""
        self.log.close(self.now)


def _no_node_twice(posted: Iterable[Posted]) -> Iterator[list[Posted]]:
    """Messages in their order, in batches; where a node's second one follows, what it keeps must be known first."""
    batch: dict[int, Posted] = {}
    for each in posted:
        if each.node in batch:
            yield [*batch.values()]
            batch = {}
        batch[each.node] = each
    yield [*batch.values()]
