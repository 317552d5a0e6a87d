"""Compressors made of others: few entries with few bits each, and every tensor of a model on its own.

A sparsifier before a quantizer: Basu, Data, Karakus, Diggavi. Qsparse-local-SGD. arXiv:1906.02367 (Lemmas 1 to 3).

Letters: C clients in the stack, P entries of a vector, k of them chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from fedsim.compress.error_feedback import contractive
from fedsim.compress.packet import Compressor, Field, Packet, bound_layout, check_stack
from fedsim.compress.quantize import Quantizer
from fedsim.compress.sparsify import Chosen
from fedsim.config import FromTable
from fedsim.params import Layout
from fedsim.streams import Streams

_VALUES = "values"


@dataclass(frozen=True, kw_only=True)
class Composed(Compressor):
    """Chooses entries, then quantizes their values: 1 + omega is the product of both, and so is delta.

    After top_k, which is biased, a quantizer with omega of 1 or more is divided by 1 + omega, and contracts like that.

    Args:
        first: what chooses entries, top_k or rand_k.
        then: what quantizes the k values: qsgd, adaptive_qsgd, terngrad, natural, bf16, fp16, natural_dithering or
            scaled_sign.
    """

    first: Annotated[Compressor, FromTable("compressor")]
    then: Annotated[Compressor, FromTable("compressor")]

    def __post_init__(self) -> None:
        if not isinstance(self.first, Chosen):
            raise ValueError(f"composed.first must choose entries, got {self.first}; take top_k or rand_k")
        if not isinstance(self.then, Quantizer):
            raise ValueError(f"composed.then must send all it is given with few bits, got {self.then}; take qsgd, say")
        if self.first.unbiased and not self.then.unbiased:
            raise ValueError(
                f"composed: {self.first} is right on average and {self.then} is not, which contracts no vector and is "
                "not unbiased either; take top_k, or another quantizer"
            )

    @property
    def unbiased(self) -> bool:
        return self.first.unbiased

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        others = (f for f in self.first.fields(num_entries) if f.name != _VALUES)
        return (*others, *_renamed(self._then(num_entries).fields(self._count(num_entries)), _VALUES))

    def shared(self, streams: Streams, num_entries: int, step: int = 0) -> dict[str, Tensor]:
        return self.first.shared(streams, num_entries, step)

    def omega(self, num_entries: int) -> float | None:
        first, then = self.first.omega(num_entries), self.then.omega(self._count(num_entries))
        return None if first is None or then is None else (1.0 + first) * (1.0 + then) - 1.0

    def delta(self, num_entries: int) -> float | None:
        if self.unbiased:
            return super().delta(num_entries)
        # What is chosen and what is left are orthogonal: |v|^2 - |top|^2 + (1 - 1 / delta') |top|^2.
        first, then = self.first.delta(num_entries), self._then(num_entries).delta(self._count(num_entries))
        return None if first is None or then is None else first * then

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        payload = dict(self.first.encode(v, streams, step).payload)
        values = self._then(v.shape[1]).encode(payload.pop(_VALUES), streams, step)
        payload |= {f"{_VALUES}.{name}": value for name, value in values.payload.items()}
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        values = self._then(num_entries).decode(_of(payload, _VALUES), self._count(num_entries))
        return self.first.decode({**payload, _VALUES: values}, num_entries)

    def _count(self, num_entries: int) -> int:
        assert isinstance(self.first, Chosen)
        return self.first.count(num_entries)

    def _then(self, num_entries: int) -> Compressor:
        return self.then if self.first.unbiased else contractive(self.then, self._count(num_entries))


@dataclass(frozen=True, kw_only=True)
class PerTensor(Compressor):
    """Compresses every tensor of the model by itself: Top-k of each, a norm for each; constants are the worst one's.

    Args:
        of: the compressor; a fraction suits tensors of different sizes.
        layout: of the model; see `bind`.
    """

    of: Annotated[Compressor, FromTable("compressor")]
    layout: Layout | None = None

    @property
    def unbiased(self) -> bool:
        return self.of.unbiased

    def bind(self, layout: Layout) -> PerTensor:
        return replace(self, layout=layout)

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        out: list[Field] = []
        for name, size, of in self._parts(num_entries):
            fields = of.fields(size)
            if any(f.optional for f in fields):
                raise ValueError(f"per_tensor.of: {of} sends all or nothing; take it for the whole model")
            out.extend(_renamed(fields, name))
        return tuple(out)

    def shared(self, streams: Streams, num_entries: int, step: int = 0) -> dict[str, Tensor]:
        parts = self._parts(num_entries)
        return {
            f"{name}.{field}": value
            for i, (name, size, of) in enumerate(parts)
            for field, value in of.shared(streams, size, step * len(parts) + i).items()
        }

    def omega(self, num_entries: int) -> float | None:
        return _worst([of.omega(size) for _, size, of in self._parts(num_entries)])

    def delta(self, num_entries: int) -> float | None:
        return _worst([of.delta(size) for _, size, of in self._parts(num_entries)])

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        return self.encode_after(v, {}, streams, step)

    def encode_after(self, v: Tensor, last: Mapping[str, Tensor], streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        parts, payload = self._parts(v.shape[1]), dict[str, Tensor]()
        pieces = v.split([size for _, size, _ in parts], dim=1)
        for i, ((name, _, of), piece) in enumerate(zip(parts, pieces, strict=True)):
            own = step * len(parts) + i  # tensors draw different numbers
            packet = of.encode_after(piece, _of(last, name), streams, own)
            payload |= {f"{name}.{field}": value for field, value in packet.payload.items()}
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        parts = self._parts(num_entries)
        return torch.cat([of.decode(_of(payload, name), size) for name, size, of in parts], dim=1)

    def _parts(self, num_entries: int) -> list[tuple[str, int, Compressor]]:
        """(name, entries, compressor) of every tensor that has entries."""
        layout = bound_layout("per_tensor", self.layout, num_entries)
        tensors = zip(layout.names, layout.shapes, layout.sizes, strict=True)
        return [(name, size, self.of.bind(Layout.of({name: shape}))) for name, shape, size in tensors if size]


def _renamed(fields: tuple[Field, ...], prefix: str) -> tuple[Field, ...]:
    return tuple(replace(f, name=f"{prefix}.{f.name}") for f in fields)


def _of(payload: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a payload that stands under a prefix."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in payload.items() if name.startswith(start)}


def _worst(constants: list[float | None]) -> float | None:
    known = [c for c in constants if c is not None]
    return max(known) if len(known) == len(constants) else None
