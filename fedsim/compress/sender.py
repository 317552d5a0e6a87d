"""Who sends packets: its random numbers, and what it keeps of one packet to begin the next with.

Most compressors begin every packet anew. One that does not (PowerSGD's warm start) marks the fields of a packet that
the next one takes up (`Field.kept`); they are kept where everything else is that the sender remembers, beside the rows
of error feedback. The receiver needs the packet alone.

Letters: C senders in the stack, P entries of a vector, n entries of a field.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.compress.packet import Compressor, Packet
from fedsim.memory import MemoryRows
from fedsim.streams import Streams


@dataclass(frozen=True)
class Sender:
    """A stack of senders of one kind of vector.

    Args:
        streams: of their random numbers.
        memory: where they keep rows.
        name: of the vector, under which rows are kept.
        step: tells apart packets of one sender and job.
    """

    streams: Streams
    memory: MemoryRows
    name: str
    step: int = 0

    @classmethod
    def of(cls, clients: Cohort, name: str, step: int = 0) -> Sender:
        """The clients of a stack."""
        return cls(clients.streams, clients.memory, name, step)

    def encode(self, compressor: Compressor, v: Tensor) -> Packet:
        """The packet of v [C, P], after the last one of this kind."""
        rows = {f.name: (f"{self.name}/{f.name}", f.count) for f in compressor.fields(v.shape[1]) if f.kept}
        last = {field: self.memory.read(row, (count,)).to(v) for field, (row, count) in rows.items()}
        packet = compressor.encode_after(v, last, self.streams, self.step)
        for field, (row, _) in rows.items():
            self.memory[row] = packet.payload[field]
        return packet
