"""Devices that lie: a grid on which some clients' replies are changed after they were honestly made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedsim.flower import wire
from tests.fedsim.flower.local_grid import LocalGrid, through_bytes

Lie = Callable[[RecordDict], Any]


class HostileGrid(LocalGrid):
    """A grid whose clients answer as their lies (by client) would have it."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.lies: dict[int, Lie] = {}

    def _answer(self, message: Message, context: Context) -> Message:
        reply = super()._answer(message, context)
        lie = self.lies.get(self._client_of[context.node_id])
        if lie is not None and message.metadata.message_type != "query":
            lie(reply.content)
            reply.content = through_bytes(reply.content)
        return reply


def array(
    name: str, data: bytes, shape: tuple[int, ...], dtype: str = "float32", stype: str = wire.RAW, only: bool = False
) -> Lie:
    """A lie that puts an array into a reply, in place of one or of all."""

    def lie(content: RecordDict) -> None:
        old = {} if only else dict(content[wire.TENSORS])
        content[wire.TENSORS] = ArrayRecord({**old, name: Array(dtype, shape, stype, data)})

    return lie


def head(**changes: Any) -> Lie:
    """A lie about the job."""
    return lambda content: content.__setitem__(wire.HEAD, ConfigRecord({**content[wire.HEAD], **changes}))


def logged(**values: Any) -> Lie:
    """A lie in metrics."""
    return lambda content: content.__setitem__(wire.LOGGED, MetricRecord({**content[wire.LOGGED], **values}))


def instead(key: str, record: Any) -> Lie:
    """Another record in place of one."""
    return lambda content: content.__setitem__(key, record)
