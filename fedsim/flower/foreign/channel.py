"""What records become between the grid and the nodes of a Flower app: compressed links, and byzantine clients.

Links and attacks are those of our own runs. What they work on is the vector of floats that a record's arrays are; what
else a record holds travels as it is. On the way down the change since the last message is compressed; nodes that are
asked together are told the same vector, and vectors of the same names and shapes share one running copy. On the way up
the vector of a reply is its change against what the node was told or, where that held no such arrays, what it replies.
Links send it as float32, and what error feedback leaves out is kept when the reply arrives. Attacks replace it in train
replies of byzantine clients, and see those that arrive from the same push.

Letters: N clients, R replies, P entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsim.compress.packet import Compressor
from fedsim.config import at
from fedsim.flower.foreign.floats import Floats
from fedsim.flower.foreign.nodes import Answer, Job
from fedsim.flower.foreign.private import UNAVAILABLE, pack, unpack
from fedsim.memory import Memory, MemoryRows
from fedsim.sim.byzantine import Byzantine
from fedsim.sim.links import Downlink, Uplink, fitted
from fedsim.streams import Streams


@dataclass(frozen=True)
class Told:
    """What a node is told.

    Args:
        content: a record, as Flower sends it.
        bits: that it takes on its way.
    """

    content: bytes
    bits: int


@dataclass(frozen=True)
class Said:
    """What a node said, as it comes out of the link.

    Args:
        answer: of the node.
        bits: that it takes on its way.
        rows: {name: [1, P]} that the node keeps if it arrives.
    """

    answer: Answer
    bits: int
    rows: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Channel:
    """See the module's head; as it stands, it lets everything through.

    Args:
        count: N.
        seed: of the run.
        uplink, downlink: compressors; None for records as they are.
        error_feedback: of the uplink.
        byzantine: who lies, and how; None for nobody.
    """

    count: int = 0
    seed: int = 0
    uplink: Compressor | None = None
    downlink: Compressor | None = None
    error_feedback: bool = False
    byzantine: Byzantine | None = None

    def __post_init__(self) -> None:
        self._memory = Memory(self.count)
        self._known: dict[bytes, Floats | None] = {}  # of what is told in one push
        self._uplinks: dict[str, Uplink] = {}
        self._downlinks: dict[str, Downlink] = {}

    def down(self, nodes: Sequence[int], contents: Sequence[bytes]) -> list[Told]:
        """What nodes that are asked together are told of their messages.

        Raises:
            ConfigError: if their vectors differ, or a record can't be compressed.
        """
        self._known.clear()
        told = {i: Told(content, 8 * len(content)) for i, content in enumerate(contents)}
        if self.downlink is None:
            return [*told.values()]
        with at("downlink.compressor"):
            together: dict[str, list[int]] = {}
            for i, content in enumerate(contents):
                if (floats := self._floats(content)) is not None:
                    together.setdefault(floats.key, []).append(i)
            for places in together.values():
                vectors = {contents[i]: self._floats(contents[i]) for i in places}
                (first, *others) = [floats for floats in vectors.values() if floats is not None]
                if not all(_same(floats.value, first.value) for floats in others):
                    raise ValueError("the app sends its clients different arrays at once; leave it out for this app")
                ids = torch.tensor([nodes[i] - 1 for i in places])
                value, bits, _ = self._down(first).send(first.key, first.value.float(), ids, self.count)
                sent = {content: _sealed(floats, value) for content, floats in vectors.items() if floats is not None}
                for i, own in zip(places, bits.tolist(), strict=True):
                    content, beside = sent[contents[i]]
                    told[i] = Told(content, beside + own)
        return [*told.values()]

    def up(self, job: Job, answer: Answer) -> Said:
        """What arrives of an answer, if it does.

        Raises:
            ConfigError: if its record can't be compressed.
        """
        bits = 8 * len(answer.content or b"")
        if self.uplink is None or answer.content is None:
            return Said(answer, bits)
        with at("uplink.compressor"):
            if (floats := Floats.of(unpack(answer.content))) is None:
                return Said(answer, bits)
            base = self._base(job, floats)
            ids, jobs = torch.tensor([job.node - 1]), torch.tensor([job.number])
            rows = MemoryRows(self._memory.of(ids), 1, floats.layout.size, torch.device("cpu"))
            change = (floats.value - base).float()
            packet = self._up(floats).encode(floats.key, change[None], rows, Streams(self.seed, ids, jobs))
            content, beside = _sealed(floats, base + packet.decode()[0])
            return Said(replace(answer, content=content), beside + int(packet.bits), rows.written)

    def arrived(self, node: int, said: Said) -> None:
        """A node's answer has arrived: it keeps what goes with that."""
        self._memory.write(torch.tensor([node - 1]), said.rows)

    def attacked(self, jobs: Sequence[Job], answers: Sequence[Answer], step: int) -> list[Answer]:
        """What is delivered of answers that arrive from one push, at this step of the server.

        Raises:
            ConfigError: if an attack can't replace what a byzantine client replied.
        """
        out = list(answers)
        trained = [i for i, job in enumerate(jobs) if job.message_type.partition(".")[0] == "train"]
        trained = [i for i in trained if out[i].content is not None]
        ids = torch.tensor([jobs[i].node - 1 for i in trained], dtype=torch.int64)
        if self.byzantine is None or bool((honest := self.byzantine.honest(ids)).all()):
            return out
        alike: dict[str, list[tuple[int, Floats, Tensor]]] = {}
        with at("clients.byzantine.attack"):
            for i, good in zip(trained, honest.tolist(), strict=True):
                if (floats := Floats.of(unpack(out[i].content or b""))) is not None:
                    alike.setdefault(floats.key, []).append((i, floats, self._base(jobs[i], floats)))
                elif not good:
                    raise ValueError(f"client {jobs[i].node - 1} replied no arrays to a train message; leave it out")
        for key, members in alike.items():
            ids = torch.tensor([jobs[i].node - 1 for i, _, _ in members])
            changes = torch.stack([floats.value - base for _, floats, base in members])
            arrive, fields = self.byzantine.deliver(ids, {key: changes}, step)
            rows, honest = iter(fields[key]), self.byzantine.honest(ids)
            for (i, floats, base), there, good in zip(members, arrive.tolist(), honest.tolist(), strict=True):
                change = next(rows) if there else None
                if change is None:
                    out[i] = Answer(None, out[i].state, UNAVAILABLE, f"node {jobs[i].node} sent nothing")
                elif not good:
                    out[i] = replace(out[i], content=pack(floats.replaced(base + change)))
        return out

    def _floats(self, content: bytes) -> Floats | None:
        """The vector of what some nodes are told."""
        if content not in self._known:
            self._known[content] = Floats.of(unpack(content))
        return self._known[content]

    def _base(self, job: Job, floats: Floats) -> Tensor:
        """[P]: what the node was told of the arrays that it replies; zeros if nothing."""
        told = self._floats(job.content)
        return told.value if told is not None and told.key == floats.key else torch.zeros_like(floats.value)

    def _up(self, floats: Floats) -> Uplink:
        assert self.uplink is not None
        if floats.key not in self._uplinks:
            bound = fitted("uplink.compressor", self.uplink, floats.layout)
            self._uplinks[floats.key] = Uplink(compressor=bound, error_feedback=self.error_feedback)
        return self._uplinks[floats.key]

    def _down(self, floats: Floats) -> Downlink:
        assert self.downlink is not None
        if floats.key not in self._downlinks:
            bound = fitted("downlink.compressor", self.downlink, floats.layout)
            self._downlinks[floats.key] = Downlink(compressor=bound, seed=self.seed)
        return self._downlinks[floats.key]


def _sealed(floats: Floats, value: Tensor) -> tuple[bytes, int]:
    """(the record with these numbers, bits of what travels beside them)."""
    return pack(floats.replaced(value)), 8 * len(pack(floats.emptied()))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, those that are no numbers as well."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
