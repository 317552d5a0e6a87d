"""The state of a stack's optimizer: buffers [C, width] on the device, counters and host numbers [C] on the host.

Everything is a row per client, so state that lives longer than a round is saved, moved between stacks and paged to
disk like any other row a client keeps (`to_rows`, `from_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_HOST = "host."
_COUNTERS = ("t", "skipped")


@dataclass(kw_only=True)
class OptState:
    """State of C clients.

    Args:
        t: [C] int64 on the CPU, how many steps each client has taken.
        skipped: [C] int64 on the CPU, how many steps were left out for a gradient that was not finite.
        buffers: {name: [C, width]} on the device of the parameters.
        host: {name: [C]} float64 on the CPU.
    """

    t: Tensor
    skipped: Tensor
    buffers: dict[str, Tensor]
    host: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_clients(self) -> int:
        """C."""
        return self.t.shape[0]

    def advance(self, k: int, left: list[int], host: Mapping[str, Any]) -> None:
        """Count a step of the first k clients but those that were left out, and keep their new host numbers."""
        if not left:
            (self.t if k == self.num_clients else self.t[:k]).add_(1)
            for name, value in host.items():
                self.host[name][:k] = torch.as_tensor(value, dtype=torch.float64)
            return
        stepped = torch.ones(k, dtype=torch.bool)
        stepped[left] = False
        self.t[:k] += stepped
        self.skipped[:k] += ~stepped
        for name, value in host.items():
            kept = self.host[name][:k]
            kept[stepped] = torch.as_tensor(value, dtype=kept.dtype).expand(k)[stepped]

    def gather(self, which: Tensor | list[int]) -> OptState:
        """A copy of some rows, in the order asked for."""
        index = torch.as_tensor(which)
        return OptState.from_rows({n: v.index_select(0, index.to(v.device)) for n, v in self.to_rows().items()})

    def to_rows(self) -> dict[str, Tensor]:
        """Flat named rows {name: [C, ...]}; the tensors are the state's own, not copies."""
        host = {_HOST + k: v for k, v in self.host.items()}
        return {"t": self.t, "skipped": self.skipped} | host | self.buffers

    @classmethod
    def from_rows(cls, rows: Mapping[str, Tensor]) -> OptState:
        """The inverse of `to_rows`."""
        return cls(
            t=rows["t"].to("cpu", torch.int64),
            skipped=rows["skipped"].to("cpu", torch.int64),
            host={k[len(_HOST) :]: v.to("cpu", torch.float64) for k, v in rows.items() if k.startswith(_HOST)},
            buffers={k: v for k, v in rows.items() if k not in _COUNTERS and not k.startswith(_HOST)},
        )

    def pack(self, like: Tensor) -> Tensor:
        """[C, S] counters, host numbers and buffers as numbers that can be averaged, in the type of `like`."""
        rows = [v.to(like).flatten(1) if v.ndim > 1 else v.to(like)[:, None] for v in self._averaged().values()]
        return torch.cat(rows, dim=1)

    def unpack_(self, packed: Tensor) -> None:
        """Take over what `pack` gave, or a mean of such: [C, S], or [S] for all clients; t is rounded.

        Raises:
            ValueError: if it is of another length.
        """
        at, size = 0, sum(v[:1].numel() for v in self._averaged().values())
        if packed.shape[-1] != size:
            raise ValueError(f"an optimizer's state of {size} numbers a client came with {packed.shape[-1]}")
        for value in self._averaged().values():
            width = value[:1].numel()
            part = packed[..., at : at + width].reshape((*packed.shape[:-1], *value.shape[1:])).to(value.device)
            value.copy_(part if value.is_floating_point() else part.round())
            at += width

    def _averaged(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.to_rows().items() if name != "skipped"}
