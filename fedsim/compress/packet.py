"""What travels: a packet of named payload tensors for a stack of clients, and its exact encoding in bytes.

A compressor turns a stack [C, P] into a `Packet`. Its payload is what the receiver needs, one row a client: float32
numbers and unsigned integers of a stated number of bits. The ledger counts the length of that encoding and the clock is
driven by it, so the encoding is real: `encode_row` writes it and `decode_row` reads it back, bit for bit. Numbers go
over the wire as float32. A stack in float64, which serves exact comparisons in a simulation, keeps its numbers in
float64 in memory and is counted and encoded as float32.

Bytes may come from anybody. A `Field` says what its entries may be, and `decode_row` takes nothing else, so that what
it makes of bytes is a packet that an encoder could have written, of finite numbers, or a ValueError.

Letters: C clients in the stack, P entries of one client's vector, n entries of one field of the payload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fedsim.params import Layout
from fedsim.streams import Streams

FLOAT_BITS = 32  # bits of a number on the wire
LIMIT = 2.0**126
"""Numbers beyond it are refused like infinity: what decoders make of smaller ones is finite in float32."""


@dataclass(frozen=True)
class Field:
    """One field of a payload: `count` entries a row.

    Args:
        name: key of the payload.
        count: entries in one row.
        bits: of one entry on the wire; 0 if the receiver needs no bits to know it.
        number: whether entries are float32 numbers; unsigned integers otherwise.
        shared: the receiver derives it from the run's seed, so it costs no bits (see `Compressor.shared`).
        optional: absent from rows whose field `sent` is 0.
        least, most: what entries lie between; of integers with a sign, what these are without it.
        signed: whether the highest bit of an integer is a sign.
        ascending: whether every entry is greater than the one before.
        kept: whether its sender's next packet begins with it (see `fedsim.compress.sender`).
    """

    name: str
    count: int
    bits: int = FLOAT_BITS
    number: bool = True
    shared: bool = False
    optional: bool = False
    least: float = -LIMIT
    most: float = LIMIT
    signed: bool = False
    ascending: bool = False
    kept: bool = False

    def check(self, entries: np.ndarray) -> None:
        """Refuse entries [n] that no encoder writes.

        Raises:
            ValueError: naming the field, what it holds, and what it may hold.
        """
        if not entries.size:
            return
        sizes = entries & ((1 << self.bits - 1) - 1) if self.signed else entries
        for found in (sizes.min(), sizes.max()):
            if not self.least <= found <= self.most:  # false of NaN, too
                raise ValueError(
                    f"field {self.name!r} holds {found:g}, and an encoder writes {self.least:g} to {self.most:g}"
                )
        if self.ascending and not bool((entries[1:] > entries[:-1]).all()):
            raise ValueError(
                f"field {self.name!r} is not in ascending order without repetition, as an encoder writes it"
            )


@runtime_checkable
class Compressor(Protocol):
    """Frozen settings of a compression rule. P is the length of the vectors that it is asked about."""

    @property
    def unbiased(self) -> bool:
        """Whether E decode(encode(v)) = v."""
        return True

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        """Compress v [C, P], float32 or float64; `step` tells apart packets of one client and job."""

    def encode_after(self, v: Tensor, last: Mapping[str, Tensor], streams: Streams, step: int = 0) -> Packet:
        """The same after another packet.

        Args:
            v, streams, step: as for `encode`.
            last: {field: [C, n]} of the fields marked `kept` in each client's last packet; zeros where there was none.
        """
        return self.encode(v, streams, step)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        """The stack [C, P] that a payload stands for."""

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        """The layout of a row on the wire, in order."""

    def shared(self, streams: Streams, num_entries: int, step: int = 0) -> dict[str, Tensor]:
        """The fields marked `shared`, derived from the streams of the packet's clients."""
        return {}

    def bind(self, layout: Layout) -> Compressor:
        """The same rule for the tensors of a model, where it matters which entries belong together."""
        return self

    def bits(self, num_entries: int) -> int:
        """Bits of one row on the wire, known before the work runs (their mean, rounded up, where they are random)."""
        return sum(f.count * f.bits for f in self.fields(num_entries) if not f.shared)

    def omega(self, num_entries: int) -> float | None:
        """The least known w with E|decode - v|^2 <= w |v|^2 for an unbiased compressor; None for a biased one."""
        return None

    def delta(self, num_entries: int) -> float | None:
        """The least known d >= 1 with E|decode - v|^2 <= (1 - 1/d) |v|^2; None if there is none."""
        omega = self.omega(num_entries)
        return None if omega is None or omega >= 1.0 else 1.0 / (1.0 - omega)


@dataclass(frozen=True, kw_only=True, eq=False)
class Packet:
    """Compressed rows of a stack.

    Args:
        compressor: that made it, and knows how to read it.
        num_entries: P.
        payload: {field: [C, n]}, as `compressor.fields(P)` lists them.
    """

    compressor: Compressor
    num_entries: int
    payload: Mapping[str, Tensor]

    def __len__(self) -> int:
        """C, the number of rows."""
        return next(iter(self.payload.values())).shape[0]

    @property
    def bits(self) -> Tensor:
        """[C] int64: exact bits on the wire of each row."""
        fields = [f for f in self.compressor.fields(self.num_entries) if not f.shared]
        always = sum(f.count * f.bits for f in fields if not f.optional)
        at_times = sum(f.count * f.bits for f in fields if f.optional)
        if not at_times:
            return torch.full((len(self),), always, dtype=torch.int64)
        return always + at_times * self.payload["sent"][:, 0].to("cpu", torch.int64)

    def decode(self) -> Tensor:
        """The stack [C, P] that the packet stands for."""
        return self.compressor.decode(self.payload, self.num_entries)

    def encode_row(self, i: int) -> bytes:
        """The bytes of row i on the wire; their number is ceil(bits[i] / 8), the last padded with zero bits."""
        sent = "sent" not in self.payload or bool(self.payload["sent"][i, 0])
        writer = _Writer()
        for f in self.compressor.fields(self.num_entries):
            if f.bits and not f.shared and (sent or not f.optional):
                writer.put(self.payload[f.name][i].detach().cpu().numpy(), f)
        return writer.close()

    @classmethod
    def decode_row(
        cls, data: bytes, compressor: Compressor, num_entries: int, shared: Mapping[str, Tensor] | None = None
    ) -> Packet:
        """Read back one row. What it allocates is in proportion to P and to the length of the data.

        Args:
            data: as `encode_row` wrote it.
            compressor: of the sender.
            num_entries: P, which the caller vouches for.
            shared: `compressor.shared` for the sender's row; needed if the compressor has shared fields.

        Raises:
            ValueError: if an encoder of this compressor and P can't have written the data, or wrote numbers that are
                not finite; or if shared fields are missing.
        """
        reader, payload = _Reader(data), {}
        for f in compressor.fields(num_entries):
            if f.shared:
                if shared is None or f.name not in shared:
                    raise ValueError(
                        f"{type(compressor).__name__}: field {f.name!r} is shared by seed and not in the data; "
                        "pass shared=compressor.shared(streams, num_entries, step)"
                    )
                payload[f.name] = shared[f.name]
            else:
                absent = f.optional and not bool(payload["sent"][0, 0])
                payload[f.name] = _zeros(f) if absent or not f.bits else torch.from_numpy(reader.take(f))[None]
        reader.close()
        return cls(compressor=compressor, num_entries=num_entries, payload=payload)


def code_dtype(bits: int) -> torch.dtype:
    """The smallest torch type that holds unsigned integers of so many bits."""
    if bits <= 8:
        return torch.uint8
    return torch.int16 if bits <= 15 else torch.int32 if bits <= 31 else torch.int64


def bound_layout(name: str, layout: Layout | None, num_entries: int) -> Layout:
    """The layout that a compressor was bound to.

    Raises:
        ValueError: if it was bound to none, or is asked about vectors of another length.
    """
    if layout is None:
        raise ValueError(f"{name} needs the shapes of the model: call bind(layout) first")
    if layout.size != num_entries:
        raise ValueError(f"{name} is bound to {layout.size} entries and was given {num_entries}")
    return layout


def check_stack(v: Tensor) -> None:
    """Refuse anything but a stack [C, P] of float32 or float64."""
    if v.ndim != 2 or v.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a compressor takes a float32 or float64 stack [C, P], got {v.dtype} of shape {tuple(v.shape)}"
        )


def _zeros(f: Field) -> Tensor:
    return torch.zeros(1, f.count, dtype=torch.float32 if f.number else code_dtype(f.bits))


class _Writer:
    """Appends fields to a bit string, lowest bit first; whole bytes are put aside as soon as they are full."""

    def __init__(self) -> None:
        self._whole: list[np.ndarray] = []
        self._open = np.empty(0, dtype=np.uint8)  # bits that do not fill a byte yet

    def put(self, values: np.ndarray, f: Field) -> None:
        raw = np.ascontiguousarray(values, dtype="<f4" if f.number else "<u4").view(np.uint8)
        if f.bits == 32 and not self._open.size:
            self._whole.append(raw)
            return
        bits = np.unpackbits(raw.reshape(-1, 4), axis=1, count=f.bits, bitorder="little").ravel()
        bits = np.concatenate([self._open, bits])
        full = bits.size // 8 * 8
        self._whole.append(np.packbits(bits[:full], bitorder="little"))
        self._open = bits[full:]

    def close(self) -> bytes:
        tail = np.packbits(self._open, bitorder="little")
        return b"".join([part.data for part in (*self._whole, tail)])


class _Reader:
    """Takes fields from a bit string in the order in which they were put."""

    def __init__(self, data: bytes) -> None:
        self._bytes = np.frombuffer(data, dtype=np.uint8)
        self._at = 0  # bits taken so far

    def take(self, f: Field) -> np.ndarray:
        start, end = self._at, self._at + f.count * f.bits
        self._at = end
        if end > 8 * self._bytes.size:
            raise ValueError(f"field {f.name!r} ends at bit {end} of {8 * self._bytes.size}: the packet was cut short")
        raw = self._bytes[start // 8 : -(-end // 8)]
        if f.bits == 32 and start % 8 == 0:
            words = raw.view("<u4")
        else:
            bits = np.unpackbits(raw, bitorder="little")[start % 8 :][: end - start].reshape(f.count, f.bits)
            padded = np.zeros((f.count, 4), dtype=np.uint8)
            packed = np.packbits(bits, axis=1, bitorder="little")
            padded[:, : packed.shape[1]] = packed
            words = padded.view("<u4").ravel()
        entries = words.view("<f4").astype(np.float32) if f.number else words.astype(_NUMPY[code_dtype(f.bits)])
        f.check(entries)
        return entries

    def close(self) -> None:
        if -(-self._at // 8) != self._bytes.size:
            raise ValueError(f"the packet needs {-(-self._at // 8)} bytes and has {self._bytes.size}")
        if self._at % 8 and self._bytes[-1] >> self._at % 8:
            raise ValueError(f"the packet ends at bit {self._at}, and bits behind it are not zero")


_NUMPY = {torch.uint8: np.uint8, torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64}
