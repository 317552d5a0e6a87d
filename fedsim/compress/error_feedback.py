"""Error feedback: what compression leaves out of one message enters a later one.

EF14: Seide et al. 1-bit stochastic gradient descent. Interspeech 2014. EF21: Richtarik, Sokolov, Fatkhullin.
arXiv:2106.05203. Pure functions: the caller keeps the rows. Both need a contraction, and make one of any compressor.

Letters: C clients in the stack, P entries of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.compress.packet import Compressor, Field, Packet
from fedsim.compress.sender import Sender
from fedsim.streams import Streams


def compress_with_error(v: Tensor, error: Tensor, compressor: Compressor, sender: Sender) -> tuple[Packet, Tensor]:
    """Send v plus what earlier messages left out (EF14).

    Args:
        v: [C, P], this round's vectors, step sizes included.
        error: [C, P], zeros at first.
        compressor: as the user named it; see `contractive`.
        sender: of the packet.

    Returns:
        (packet of v + error, the new error [C, P]); sum of all decoded packets + last error = sum of all v.
    """
    u = v + error
    packet = sender.encode(contractive(compressor, v.shape[1]), u)
    return packet, u - packet.decode()


def compress_difference(v: Tensor, reference: Tensor, compressor: Compressor, sender: Sender) -> tuple[Packet, Tensor]:
    """Send v minus a reference that both sides keep, which moves by what was sent (EF21).

    Args:
        v: [C, P].
        reference: [C, P], the same on both sides.
        compressor: as the user named it; see `contractive`.
        sender: of the packet.

    Returns:
        (packet of v - reference, the new reference [C, P], which is the receiver's estimate of v).
    """
    packet = sender.encode(contractive(compressor, v.shape[1]), v - reference)
    return packet, reference + packet.decode()


def contractive(compressor: Compressor, num_entries: int) -> Compressor:
    """The compressor as it stands where it contracts vectors of P entries, or is biased; else scaled so that it does.

    Rand-k, Bernoulli and coarse QSGD are unbiased and send vectors longer than they were given (omega >= 1): what error
    feedback or a running copy left out would grow from message to message.
    """
    expands = compressor.unbiased and compressor.delta(num_entries) is None
    return Contractive(of=compressor) if expands else compressor


@dataclass(frozen=True, kw_only=True)
class Contractive(Compressor):
    """An unbiased compressor divided by 1 + omega: biased, and contractive with delta = 1 + omega."""

    of: Compressor
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.of.unbiased:
            raise ValueError(f"{self.of} is biased and needs no scaling; give it to error feedback as it is")

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return self.of.fields(num_entries)

    def shared(self, streams: Streams, num_entries: int, step: int = 0) -> dict[str, Tensor]:
        return self.of.shared(streams, num_entries, step)

    def bits(self, num_entries: int) -> int:
        return self.of.bits(num_entries)

    def delta(self, num_entries: int) -> float | None:
        omega = self.of.omega(num_entries)
        assert omega is not None  # it is unbiased
        return 1.0 + omega

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        packet = self.of.encode(v, streams, step)
        return Packet(compressor=self, num_entries=packet.num_entries, payload=packet.payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        delta = self.delta(num_entries)
        assert delta is not None
        return self.of.decode(payload, num_entries) / delta
