"""Compressed links: what a reply or a broadcast becomes on its way, and how many bits that takes.

Upwards every vector of a reply is compressed on its own, with error feedback if asked for (EF14; the error is a row of
the client's memory). Downwards the server sends the compressed change of a vector since its last message, and both
sides keep the same running copy; what a message leaves out is in the next change, so no error is lost. A client that
missed messages is sent those, or the whole vector if that is shorter.

Letters: N clients, R recipients, C clients of a stack, P entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.compress.error_feedback import compress_difference, compress_with_error
from fedsim.compress.packet import FLOAT_BITS, Compressor, Packet
from fedsim.compress.sender import Sender
from fedsim.config import at
from fedsim.memory import MemoryRows
from fedsim.params import Layout
from fedsim.streams import Streams

UPLINK = "uplink/"  # in a client's memory the error's rows are called so, and what is kept of packets


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """How replies are compressed.

    Args:
        compressor: a rule.
        error_feedback: add to each message what earlier ones left out.
    """

    compressor: Compressor
    error_feedback: bool = False

    def encode(self, name: str, v: Tensor, memory: MemoryRows, streams: Streams) -> Packet:
        """The packet of one field v [C, P] of replies, by clients with this memory and these streams."""
        sender = Sender(streams, memory, UPLINK + name, step_of(name))
        if not self.error_feedback:
            return sender.encode(self.compressor, v)
        error = memory.read(sender.name, tuple(v.shape[1:])).to(v)
        packet, memory[sender.name] = compress_with_error(v, error, self.compressor, sender)
        return packet


@dataclass
class Copy:
    """What clients know of one broadcast vector.

    Args:
        value: [P], the running copy after the newest message.
        version: number of the newest message.
        length: bits of all messages that were compressed.
        seen: [N] number of the last message each client got; 0 for none.
        known: [N] `length` by then.
        kept: {name: [1, n]} of the newest packet, for the next (see `fedsim.compress.sender`).
    """

    value: Tensor
    version: int
    length: int
    seen: Tensor
    known: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A message about a broadcast vector: the packet of its change, and the key of the packet's random numbers."""

    packet: Packet
    key: tuple[int, int, int, int]


@dataclass(kw_only=True)
class Downlink:
    """How broadcasts are compressed.

    Args:
        compressor: a rule.
        seed: of the run.
        copies: by name of the broadcast vector.
    """

    compressor: Compressor
    seed: int
    copies: dict[str, Copy] = field(default_factory=dict)

    def send(self, name: str, v: Tensor, ids: Tensor, num_clients: int) -> tuple[Tensor, Tensor, Change | None]:
        """(what clients get [P], bits to each recipient [R], the message or None for the first) of a vector v [P]."""
        change = None
        if name not in self.copies:
            never = torch.zeros(num_clients, dtype=torch.int64)
            self.copies[name] = Copy(v.clone(), 1, 0, never, never.clone())
        else:
            copy = self.copies[name]
            key = self.seed, step_of(name), copy.version, 0
            streams = Streams(self.seed, *(torch.tensor([part]).to(v.device) for part in key[1:3]))
            memory = MemoryRows(copy.kept, 1, v.numel(), v.device)
            sender = Sender(streams, memory, name)
            packet, value = compress_difference(v[None], copy.value[None], self.compressor, sender)
            copy.kept = memory.written
            copy.value, copy.version, copy.length = value[0], copy.version + 1, copy.length + int(packet.bits[0])
            change = Change(packet, key)
        copy, whole = self.copies[name], FLOAT_BITS * v.numel()
        missed = (copy.length - copy.known[ids]).clamp(max=whole)
        bits = torch.where(copy.seen[ids] == 0, whole, missed)
        copy.seen[ids], copy.known[ids] = copy.version, copy.length
        return copy.value, bits, change

    def bits(self, num_entries: int, messages: Tensor) -> Tensor:
        """[R] bits to clients that are sent so many messages [R] at once, the whole vector if that is shorter."""
        whole, each = FLOAT_BITS * num_entries, self.compressor.bits(num_entries)
        return (messages.clamp(max=whole // max(each, 1) + 1) * each).clamp(max=whole)


def fitted(key: str, compressor: Compressor, layout: Layout) -> Compressor:
    """The compressor of this key, bound to what travels.

    Raises:
        ConfigError: if it does not fit.
    """
    with at(key):
        bound = compressor.bind(layout)
        bound.bits(layout.size)
    return bound


def step_of(name: str) -> int:
    """The step under which the packets of a field draw their numbers: two fields of one reply draw different ones."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name))
