"""PowerSGD: each matrix of a model is sent as the product of two thin ones.

Vogels, Karimireddy, Jaggi. PowerSGD: practical low-rank gradient compression for distributed optimization.
arXiv:1905.13727, algorithm 1. Departures: every client has a Q of its own; the side that Q stands on is always the
shorter one. The receiver needs the two factors only.

For M [a, b], a >= b, and Q [b, r]: P = orthonormal basis of M Q, and P P^T M is sent as P and M^T P, which is the next
message's Q. Where M stays as it is, messages are steps of orthogonal iteration: P turns to the first r left singular
vectors by (s_{r+1} / s_r)^2 a message. The first Q is random, and so is that after a message of zeros.

The projection keeps at least |M Q'|^2, Q' an orthonormal basis of Q. For a random Q its mean is r / b |M|^2: hence
delta = b / r. Of a Q that was kept nothing is known, since M may have turned away from it.

Letters: C clients in the stack, P entries of a vector (and the factor [a, r] above), r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.compress.packet import LIMIT, Compressor, Field, Packet, bound_layout, check_stack
from fedsim.params import Layout
from fedsim.streams import Streams


@dataclass(frozen=True, kw_only=True)
class PowerSGD(Compressor):
    """Sends each matrix as two factors of rank r, 32 r (a + b) bits, and vectors as they are.

    A tensor of three or more axes is a matrix [first axis, rest]. One that the factors would not make smaller is sent
    as it is. Meant for error feedback, which makes up for the bias.

    Args:
        rank: r, at least 1.
        warm_start: begin where the sender's last message ended; else at random every time, with delta = max b / r.
        layout: of the model; see `bind`.
    """

    rank: int
    warm_start: bool = True
    layout: Layout | None = None
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"powersgd.rank must be at least 1, got {self.rank}")

    def bind(self, layout: Layout) -> PowerSGD:
        return replace(self, layout=layout)

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        out: list[Field] = []
        for name, a, b in self._matrices(num_entries):
            basis, other = 1.0 + 2.0**-10, LIMIT / self.rank  # what an orthonormal factor holds, to rounding
            left, right = (basis, other) if a >= b else (other, basis)
            tall, warm = a >= b, self.warm_start
            out.append(Field(f"{name}.left", a * self.rank, least=-left, most=left, kept=warm and not tall))
            out.append(Field(f"{name}.right", b * self.rank, least=-right, most=right, kept=warm and tall))
        return (*out, Field("rest", num_entries - sum(a * b for _, a, b in self._matrices(num_entries))))

    def delta(self, num_entries: int) -> float | None:
        if self.warm_start:
            return None
        return max((min(a, b) / self.rank for _, a, b in self._matrices(num_entries)), default=1.0)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        return self.encode_after(v, {}, streams, step)

    def encode_after(self, v: Tensor, last: Mapping[str, Tensor], streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        views, payload = self._layout(v.shape[1]).views(v), {}
        matrices = self._matrices(v.shape[1])
        for name, a, b in matrices:
            m = views[name].reshape(-1, a, b)
            tall = m if a >= b else m.transpose(1, 2)
            q = streams.normal(f"compress.powersgd.{name}", tall.shape[2], self.rank, step=step, dtype=v.dtype)
            if (kept := last.get(f"{name}.{'right' if a >= b else 'left'}")) is not None:
                size = kept.abs().amax(dim=1).view(-1, 1, 1)  # divided by it, products stay within float32
                q = torch.where((size > 0) & (size < torch.inf), kept.view(q.shape) / size, q)
            left = torch.linalg.qr(tall @ q).Q
            right = tall.transpose(1, 2) @ left
            factors = (left, right) if a >= b else (right, left)
            payload[f"{name}.left"], payload[f"{name}.right"] = (t.reshape(len(v), -1) for t in factors)
        sent = {name for name, _, _ in matrices}
        rest = [view.reshape(len(v), -1) for name, view in views.items() if name not in sent]
        payload["rest"] = torch.cat(rest, dim=1) if rest else v[:, :0]
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        rest, at = payload["rest"], 0
        sizes = {name: (a, b) for name, a, b in self._matrices(num_entries)}
        parts = []
        layout = self._layout(num_entries)
        for name, size in zip(layout.names, layout.sizes, strict=True):
            if name in sizes:
                a, b = sizes[name]
                left = payload[f"{name}.left"].reshape(-1, a, self.rank)
                right = payload[f"{name}.right"].reshape(-1, b, self.rank)
                parts.append((left @ right.transpose(1, 2)).reshape(-1, a * b))
            else:
                parts.append(rest[:, at : at + size])
                at += size
        return torch.cat(parts, dim=1)

    def _matrices(self, num_entries: int) -> list[tuple[str, int, int]]:
        """(name, a, b) of every tensor that is sent as factors."""
        layout = self._layout(num_entries)
        sizes = ((name, s[0], prod(s[1:])) for name, s in zip(layout.names, layout.shapes, strict=True) if len(s) >= 2)
        return [(name, a, b) for name, a, b in sizes if self.rank * (a + b) < a * b]

    def _layout(self, num_entries: int) -> Layout:
        return bound_layout("powersgd", self.layout, num_entries)
