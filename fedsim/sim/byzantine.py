"""Byzantine clients in the simulator: their vectors are replaced when replies are delivered.

An attack sees the vectors of the honest clients that arrive together with its own, which no real adversary could
do better than. It runs once for every vector-valued field of the replies.

Letters: R replies, H honest and b byzantine ones among them, P entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsim.streams import Streams


@dataclass
class Knowledge:
    """What an attack knows besides the vectors: the server step, and what it noted in earlier ones."""

    step: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Byzantine:
    """Which clients are byzantine and what they do.

    Args:
        ids: [b] clients.
        attack: (honest [H, P], b, streams, knowledge) -> [b, P], or None if they send nothing.
        on_data: the attack poisons data instead; then nothing is replaced here.
        seed: of the run.
        known: {field: what the attack noted}.
    """

    ids: Tensor
    attack: Callable[[Tensor, int, Streams, Any], Tensor | None]
    on_data: bool
    seed: int
    known: dict[str, Knowledge] = field(default_factory=dict)

    def honest(self, ids: Tensor) -> Tensor:
        """[R] bool: which of these clients are honest."""
        return ~torch.isin(ids, self.ids)

    def deliver(self, ids: Tensor, fields: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(which replies arrive [R] bool, fields with byzantine rows replaced)."""
        good = self.honest(ids)
        arrive = torch.ones(len(ids), dtype=torch.bool)
        if self.on_data or bool(good.all()) or not bool(good.any()):
            return arrive, fields
        out = dict(fields)
        bad = ids[~good]
        for name, value in fields.items():
            if value.ndim < 2:
                continue
            known = self.known.setdefault(name, Knowledge())
            known.step = step
            at = good.to(value.device)
            streams = Streams(self.seed, bad.to(value.device), torch.full_like(bad, step).to(value.device))
            sent = self.attack(value[at], len(bad), streams, known)
            if sent is None:
                return good, {k: v[good.to(v.device)] if v.ndim else v for k, v in fields.items()}
            value = value.clone()
            value[~at] = sent.to(value)
            out[name] = value
        return arrive, out
