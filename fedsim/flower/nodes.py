"""The nodes of a Flower grid: which of them is which client, and messages to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError
from torch import Tensor

from fedsim.flower.clock import Clock, Patience
from fedsim.flower.door import Door, Refused
from fedsim.sim.executor import ClientError

GONE = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""Errors that say that a node, and not what ran on it, is at fault."""
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, DecodeError)
"""What Flower raises where a reply's parts are not what its own client writes."""
LONGEST = 2000  # characters of an error that are shown


@dataclass(frozen=True)
class Nodes:
    """The clients of a federation: the grid's number of each, and how many samples [N] it says it has."""

    node_ids: tuple[int, ...]
    num_examples: Tensor


def connect(grid: Grid, num_clients: int, door: Door, clock: Clock, patience: Patience) -> Nodes:
    """Wait until every client has a node, and ask each how many samples it has.

    Raises:
        ClientError: if nodes are missing when patience is over, two say they are the same client, or one says nothing
            that can be.
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
        for number, message in pull(grid, asked).items():
            node = asked.pop(number)
            if message.has_error() and message.error.code in GONE:
                known.remove(node)  # it left again, and is asked anew when it is back
                continue
            if message.has_error():
                raise ClientError(f"node {node}: {reason(message)}")
            try:
                client, num_examples = door.about(message.content, num_clients)
            except Refused as e:
                raise ClientError(f"node {node}: {e}") from e
            if client in found:
                raise ClientError(f"nodes {found[client][0]} and {node} both have partition-id={client}")
            found[client] = node, num_examples
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


def pull(grid: Grid, numbers: Iterable[str]) -> dict[str, Message]:
    """{number of a message: its reply} of those that have come in.

    Raises:
        ClientError: if what a device sent is not even a message to Flower, which does not say whose it was.
    """
    awaited = dict.fromkeys(numbers)
    try:
        found = list(grid.pull_messages([*awaited])) if awaited else []
    except UNREADABLE as e:
        what = "Flower can't read what one of the devices sent, and takes no other reply of this look"
        raise ClientError(f"{what} ({type(e).__name__}: {e}); find the device, then go on by fedsim-resume") from e
    return {number: m for m in found if (number := m.metadata.reply_to_message_id) in awaited}


def reason(message: Message) -> str:
    """Why a client, or the network, answered with an error; on one line, since the client may have written it."""
    said = "".join(c if c.isprintable() else " " for c in message.error.reason[:LONGEST])
    return f"{said} (Flower's error {message.error.code})"
