"""What crosses Flower's wire: named tensors, numbers, nothing, and packets, as records and back.

A tensor travels as its raw little-endian bytes, without the 128 bytes of header that a `.npy` file has, and comes back
bit for bit. A packet travels as the bytes that its compressor writes, so that the length of an array's data is its
true payload. Which compressor that was is said by a name that both ends know from the experiment file (the `Book`);
fields that the receiver draws itself are drawn from the key of the sender's random numbers, which goes along.

Letters: P entries of a vector.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, prod
from reprlib import repr as brief
from typing import Any, get_type_hints

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedsim.compress.error_feedback import Contractive
from fedsim.compress.packet import Compressor, Packet
from fedsim.graph import Graph, Inbox
from fedsim.sim.account import bits_of
from fedsim.strategy import Strategy, compressors
from fedsim.streams import Streams

RAW = "fedsim.raw"
PACKET = "fedsim.packet"
_KINDS = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _KINDS.split()}  # what travels
HEAD, TENSORS, NUMBERS, NOTHING = "fedsim.head", "fedsim.tensors", "fedsim.numbers", "fedsim.nothing"
INBOX, HEARD, LOGGED, ABOUT = "fedsim.inbox", "fedsim.heard", "fedsim.logged", "fedsim.about"

Key = tuple[int, int, int, int]
"""(seed, client, job, step) of the random numbers behind a packet."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a message says besides its values.

    Args:
        work: name of the strategy's method.
        client: whose job it is, or whose reply.
        number: job index of that client, part of its random keys.
        round: the server step at which the job was sent.
        version: how often the client had written its memory when the job begins, or when the reply was sent.
        saved: the same in the server's last checkpoint, to which a resumed run goes back.
        run: a number that no other run has, and that a resumed one keeps: a device remembers for each run apart.
    """

    work: str
    client: int
    number: int
    round: int
    version: int
    saved: int
    run: int

    def write(self, content: RecordDict) -> None:
        content[HEAD] = ConfigRecord(asdict(self))

    @classmethod
    def read(cls, content: RecordDict) -> Head:
        """The head of a message.

        Raises:
            ValueError: if the message has none, so that it comes from another kind of app.
        """
        head = content.get(HEAD)
        if head is None:
            raise ValueError(f"the message holds {brief(list(content))} and no {HEAD!r}: its sender is not fedsim")
        if {name: type(value) for name, value in head.items()} != _HEAD:
            raise ValueError(f"the head of the message is {brief(dict(head))}, and needs {', '.join(_HEAD)}")
        return cls(**head)


_HEAD = get_type_hints(Head)


@dataclass(frozen=True)
class Book:
    """Compressors by a name that both ends give them."""

    compressors: Mapping[str, Compressor]

    @classmethod
    def of(cls, strategy: Strategy, links: Mapping[str, Compressor | None]) -> Book:
        """Those of an experiment: the strategy's fields and the two links, as they are and scaled."""
        found = {k: c for k, c in links.items() if c is not None}
        found |= {f"strategy.{name}": c for name, c in compressors(strategy).items()}
        out: dict[str, Compressor] = {}
        for name, compressor in found.items():
            out[name] = compressor
            if compressor.unbiased:
                out[f"{name}/contractive"] = Contractive(of=compressor)
        return cls(out)

    def name(self, compressor: Compressor) -> str:
        """What the other end calls a compressor.

        Raises:
            ValueError: if it is in no field of the strategy and in no link, so that the other end can't know it.
        """
        for name, known in self.compressors.items():
            if known == compressor:
                return name
        raise ValueError(
            f"a packet was made by {compressor}, which the other end does not know; make it a field of the strategy, "
            "or the uplink's or downlink's compressor"
        )


def write(values: Mapping[str, Any], book: Book, keys: Sequence[Key] = ()) -> RecordDict:
    """Records for named values.

    Args:
        values: tensors of any shape, numbers, text, None, or packets of one row.
        book: names of compressors.
        keys: of random numbers that packets with shared fields may have been made with.

    Raises:
        ValueError: for a value of another kind, a packet of several rows, or one whose shared fields follow from none
            of the keys.
    """
    tensors: dict[str, Array] = {}
    numbers: dict[str, Any] = {}
    nothing: list[str] = []
    for name, value in values.items():
        if isinstance(value, np.generic):
            value = value.item()
        if value is None:
            nothing.append(name)
        elif isinstance(value, Packet):
            tensors[name] = packet_array(value, book, keys)
        elif isinstance(value, Tensor):
            tensors[name] = raw_array(value)
        elif isinstance(value, bool | int | float | str):
            numbers[name] = value
        else:
            raise ValueError(
                f"{name} is a {type(value).__name__}; only tensors, packets, numbers, text and None can travel"
            )
    out = RecordDict()
    out[TENSORS], out[NUMBERS] = ArrayRecord(tensors), ConfigRecord(numbers)
    out[NOTHING] = ConfigRecord({"names": nothing})
    return out


def read(content: RecordDict, book: Book, longest: float = inf, keys: Container[Key] | None = None) -> dict[str, Any]:
    """The inverse of `write`; a packet comes back as a packet, on the CPU.

    Args:
        content: of a message.
        book: names of compressors.
        longest: entries of a vector that a packet may stand for.
        keys: of random numbers that packets may have been made with; None is any.

    Raises:
        ValueError: if a tensor or a packet is not what its sender can have written, or is longer than it may be; or a
            compressor's name is unknown here. Nothing is allocated before that is known.
    """
    out: dict[str, Any] = {name: None for name in content[NOTHING]["names"]}
    out |= dict(content[NUMBERS])
    return out | {name: of_array(array, book, longest, keys) for name, array in content[TENSORS].items()}


def write_inbox(content: RecordDict, inbox: Inbox) -> int:
    """Add one client's inbox to its message: only the vectors that reach it travel; their bits."""
    rows, total = inbox.heard.peers, len(next(iter(inbox.fields.values())))
    vectors = {k: v[rows] for k, v in inbox.fields.items()}
    content[INBOX] = ArrayRecord({k: raw_array(v) for k, v in vectors.items()})
    heard = inbox.heard
    about = {"rows": rows.tolist(), "weights": heard.weights.tolist(), "own": int(heard.own), "lost": int(heard.lost)}
    content[HEARD] = ConfigRecord({**about, "total": total})
    return sum(map(bits_of, vectors.values()))


def read_inbox(content: RecordDict) -> Inbox | None:
    """The inbox of a message, None for work that is no exchange.

    Rows of vectors that did not reach this client are zero, so that all clients compute on arrays of one shape, as they
    do in a simulation, and get the same last bits.
    """
    if INBOX not in content:
        return None
    about = content[HEARD]
    rows, total = torch.tensor(about["rows"], dtype=torch.int64), int(about["total"])
    fields = {}
    for name, array in content[INBOX].items():
        vectors = _tensor(array)
        fields[name] = vectors.new_zeros(total, *vectors.shape[1:]).index_copy_(0, rows, vectors)
    weights = torch.tensor(about["weights"], dtype=torch.float64)
    own, lost = (torch.tensor([int(about[key])]) for key in ("own", "lost"))
    return Inbox(fields, Graph(torch.tensor([0, len(rows)]), rows, weights, own, lost))


def raw_array(value: Tensor) -> Array:
    """A tensor as its raw bytes."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return Array(str(value.dtype).removeprefix("torch."), tuple(value.shape), RAW, data)


def packet_array(packet: Packet, book: Book, keys: Sequence[Key] = ()) -> Array:
    """A packet of one row as its encoding."""
    if len(packet) != 1:
        raise ValueError(f"a packet of {len(packet)} rows was sent to one client; send one row")
    stype = f"{PACKET}/{book.name(packet.compressor)}"
    if any(f.shared for f in packet.compressor.fields(packet.num_entries)):
        stype += "@" + ",".join(str(part) for part in _key_of(packet, keys))
    return Array("uint8", (packet.num_entries,), stype, packet.encode_row(0))


def of_array(array: Array, book: Book, longest: float = inf, keys: Container[Key] | None = None) -> Tensor | Packet:
    """What an array stands for; see `read`."""
    if array.stype == RAW:
        return _tensor(array)
    kind, _, rest = array.stype.partition("/")
    name, _, written = rest.partition("@")
    if kind != PACKET or name not in book.compressors:
        raise ValueError(
            f"an array of kind {brief(array.stype)} arrived, which this experiment does not know ({RAW}, "
            f"{', '.join(f'{PACKET}/{k}' for k in book.compressors)}); both ends need the same experiment file"
        )
    compressor = book.compressors[name]
    if len(array.shape) != 1 or not 1 <= array.shape[0] <= longest:
        raise ValueError(f"a packet for a vector of shape {brief(array.shape)} arrived, and {longest} is the longest")
    (num_entries,) = array.shape
    shared = {}
    if any(f.shared for f in compressor.fields(num_entries)):
        seed, client, job, step = _key(written, keys)
        shared = compressor.shared(Streams(seed, torch.tensor([client]), torch.tensor([job])), num_entries, step)
    elif written:
        raise ValueError(f"a packet with a key arrived ({brief(array.stype)}), and its compressor {name} needs none")
    return Packet.decode_row(array.data, compressor, num_entries, shared)


def _key(written: str, keys: Container[Key] | None) -> Key:
    """The key that a packet was sent with."""
    parts = written.split(",")
    if len(parts) != 4 or not all(re.fullmatch(r"-?[0-9]{1,19}", part) for part in parts):
        raise ValueError(f"a packet came without the key of its random numbers: {brief(written)}")
    seed, client, job, step = map(int, parts)
    if keys is not None and (seed, client, job, step) not in keys:
        raise ValueError(f"a packet came with the key {written}, which is not its sender's")
    return seed, client, job, step


def _tensor(array: Array) -> Tensor:
    dtype, shape = _DTYPES.get(array.dtype), array.shape
    if dtype is None:
        raise ValueError(f"an array of type {brief(array.dtype)} arrived, which is none of {', '.join(_DTYPES)}")
    if not all(0 <= size < 2**31 for size in shape) or len(shape) > 8:
        raise ValueError(f"an array of shape {brief(shape)} arrived, and no tensor has it")
    want = dtype.itemsize * prod(shape)
    if len(array.data) != want:
        raise ValueError(f"{array.dtype}{list(shape)} takes {want} bytes and {len(array.data)} arrived")
    if not want:
        return torch.zeros(0, dtype=dtype).new_empty(shape)
    return torch.frombuffer(bytearray(array.data), dtype=torch.uint8).view(dtype).reshape(shape)


def _key_of(packet: Packet, keys: Sequence[Key]) -> Key:
    """The key from which a packet's shared fields follow."""
    for key in keys:
        seed, client, job, step = key
        streams = Streams(seed, torch.tensor([client]), torch.tensor([job]))
        drawn = packet.compressor.shared(streams, packet.num_entries, step)
        if all(torch.equal(packet.payload[k].cpu(), v) for k, v in drawn.items()):
            return key
    raise ValueError(
        f"{packet.compressor} leaves numbers out that the receiver draws itself, but they follow from no key that it "
        "knows; set shared_seed: false, so that they are sent"
    )
