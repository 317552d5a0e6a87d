"""Seeds: a vector by its coordinates along random directions that sender and receiver both draw.

A local run of MeZO (Malladi et al. arXiv:2305.17333) moves along such directions and nowhere else, so that its change
is one number a step, which the receiver replays. With the directions of `local.optimizer: mezo`, keyed by client, job
and step, nothing is lost but rounding. Of other vectors it is the projection on a random subspace (Kozak, Becker,
Doostan, Tenorio. Stochastic subspace descent. arXiv:1904.01145), whose mean square is T / n of the vector's.
Departure: seeds follow from the run's, from client, job and step, and need not be sent.

Letters: C clients in the stack, P entries of a vector, n of them trainable, T directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.compress.packet import LIMIT, Compressor, Field, Packet, bound_layout, check_stack
from fedsim.params import Layout
from fedsim.streams import Streams, normal_of

_LONGEST = 16.0  # no normal number of `Streams` is farther from zero than 8.6
_BLOCK = 1 << 24  # entries of directions that are in memory at a time, or those of one row


@dataclass(frozen=True, kw_only=True)
class Seeds(Compressor):
    """Sends one number for each of T directions, which follow from seeds: 32 T bits; exact after T steps of mezo.

    Buffers are sent as they are. Weight decay, learning rates that differ among tensors and a `state_scope` beyond the
    round lead out of these directions' span. What is outside of it is lost, or left to error feedback: delta = n / T.

    Args:
        steps: local steps that a job takes at most.
        directions: of a step, as in `local.optimizer.zeroth_order`; T = steps * directions.
        layout: of the model; see `bind`.
    """

    steps: int
    directions: int = 1
    layout: Layout | None = None
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.directions < 1:
            raise ValueError(
                f"seeds needs at least one step and direction, got steps={self.steps} and directions={self.directions}"
            )

    def bind(self, layout: Layout) -> Seeds:
        return replace(self, layout=layout)

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        count, trained = self._count(num_entries), self._trained(num_entries)
        most = LIMIT / (_LONGEST * count)
        key = Field("key", count, 64, number=False, shared=True)
        return Field("values", count, least=-most, most=most), Field("rest", num_entries - trained), key

    def shared(self, streams: Streams, num_entries: int, step: int = 0) -> dict[str, Tensor]:
        # the names under which the optimizer core draws its directions; steps are numbered from 1
        names = [f"optimizer direction {i}" for i in range(self.directions)]
        keys = [streams.keys(name, t + 1) for t in range(self.steps) for name in names]
        return {"key": torch.stack(keys, dim=1)}

    def delta(self, num_entries: int) -> float | None:
        return self._trained(num_entries) / self._count(num_entries)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        trained = self._trained(v.shape[1])
        key = self.shared(streams, v.shape[1])["key"]
        values = torch.empty(key.shape, dtype=v.dtype, device=v.device)
        for rows, z in _directions(key, trained):
            products = z @ v[rows, :trained, None].double()
            values[rows] = torch.linalg.solve(z @ z.transpose(1, 2), products)[:, :, 0].to(v.dtype)
        payload = {"values": values, "rest": v[:, trained:], "key": key}
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        values, rest = payload["values"], payload["rest"]
        trained = num_entries - rest.shape[1]
        out = torch.empty(len(values), num_entries, dtype=values.dtype, device=values.device)
        for rows, z in _directions(payload["key"], trained):
            out[rows, :trained] = (values[rows, None, :].double() @ z)[:, 0].to(out.dtype)
        out[:, trained:] = rest
        return out

    def _count(self, num_entries: int) -> int:
        """T."""
        count, trained = self.steps * self.directions, self._trained(num_entries)
        if count > trained:
            raise ValueError(f"seeds: {count} directions exceed the {trained} entries that train; send these instead")
        return count

    def _trained(self, num_entries: int) -> int:
        """n."""
        return num_entries if self.layout is None else bound_layout("seeds", self.layout, num_entries).num_trainable


def _directions(key: Tensor, num_entries: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their directions [rows, T, n] float64), as many rows at a time as fit."""
    width = max(1, _BLOCK // (key.shape[1] * num_entries))
    for start in range(0, len(key), width):
        rows = slice(start, start + width)
        z = normal_of(key[rows].flatten(), num_entries, torch.float64)
        yield rows, z.view(-1, key.shape[1], num_entries)
