"""A Flower grid inside this process: the same apps and the same messages, without a network.

Every message and every client's context is turned into Flower's bytes and back, as on a real grid, so that what passes
here passes there. On a virtual clock a reply arrives when its client's seconds are over; the work is done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedsim.flower.clock import Clock
from fedsim.flower.foreign.private import RAISED, RUN_ID, SERVER_ID, UNAVAILABLE, OwnGrid, number
from fedsim.sim.account import TOLERANCE


@dataclass
class VirtualClock(Clock):
    """Time that passes only in `sleep`."""

    seconds: float = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class LocalGrid(OwnGrid):
    """See the module's head.

    Args:
        app: every client's.
        num_clients: N; client i's node has partition-id i and a number that says nothing about i.
        run_config: what all apps see.
        clock: when replies arrive.
        seconds: from sending a client its message to its reply, by client; at once if left out.
    """

    def __init__(
        self,
        app: ClientApp,
        num_clients: int,
        run_config: Mapping[str, Any] | None = None,
        *,
        clock: Clock | None = None,
        seconds: Callable[[int], float] = lambda client: 0.0,
    ) -> None:
        super().__init__()
        self._app, self.clock, self._seconds = app, clock or VirtualClock(), seconds
        self.contexts: dict[int, Context] = {}
        self._client_of: dict[int, int] = {}
        for client in range(num_clients):
            node = (client + 1) * 7919 % 104729 + SERVER_ID  # distinct, and not in the clients' order
            config = {"partition-id": client, "num-partitions": num_clients}
            self._client_of[node] = client
            self.contexts[node] = Context(RUN_ID, node, config, RecordDict(), dict(run_config or {}))
        self.gone: set[int] = set()  # clients whose nodes are not connected
        self._replies: dict[str, tuple[float, Message]] = {}
        self.num_messages = 0

    def get_node_ids(self) -> Iterable[int]:
        return sorted(node for node in self.contexts if self._client_of[node] not in self.gone)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.num_messages += 1
            key = f"message-{self.num_messages}"
            node = number(message, key).metadata.dst_node_id
            due = self.clock.now() + self._seconds(self._client_of[node])
            answer = self._unavailable if self._client_of[node] in self.gone else self._answer
            self._replies[key] = due, answer(message, self.contexts[node])
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [key for key in message_ids if key in self._replies]
        due = [key for key in wanted if self._replies[key][0] <= self.clock.now() + TOLERANCE]
        return [self._replies.pop(key)[1] for key in due]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting, out = set(self.push_messages(messages)), list[Message]()
        end = None if timeout is None else self.clock.now() + timeout
        while waiting and (end is None or self.clock.now() < end):
            out += (came := list(self.pull_messages(waiting)))
            waiting -= {m.metadata.reply_to_message_id for m in came}
            if waiting:
                self.clock.sleep(0.1)
        return out

    def _unavailable(self, message: Message, context: Context) -> Message:
        """What a SuperLink says of a node that is not connected."""
        arrived = Message(message.content, context.node_id, message.metadata.message_type)
        number(arrived, message.metadata.message_id)
        return Message(Error(code=UNAVAILABLE, reason="node unavailable"), reply_to=arrived)

    def _answer(self, message: Message, context: Context) -> Message:
        """The client's reply; its context changes only if there is one, as on a SuperNode."""
        content, state = through_bytes(message.content), through_bytes(context.state)
        here = Context(RUN_ID, context.node_id, dict(context.node_config), state, dict(context.run_config))
        arrived = Message(content, context.node_id, message.metadata.message_type, group_id=message.metadata.group_id)
        number(arrived, message.metadata.message_id)
        try:
            reply = self._app(arrived, here)
        except Exception as error:
            return Message(Error(code=RAISED, reason=f"{type(error)}:<'{error}'>"), reply_to=arrived)
        reply.content = through_bytes(reply.content)
        context.state = here.state
        return reply


def through_bytes(record: RecordDict) -> RecordDict:
    """A record after a trip as Flower's bytes."""
    return inflate_object_from_contents(record.object_id, as_bytes(record))


def as_bytes(record: RecordDict) -> dict[str, bytes]:
    """What travels of a record: its parts by their numbers."""
    return {key: part.deflate() for key, part in get_all_nested_objects(record).items()}
