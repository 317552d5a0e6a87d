"""What is known of each device of a deployment: how its jobs ended, how long they took, what it logged last."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any, Literal

import torch
from torch import Tensor

End = Literal["replied", "dropped", "failed", "refused"]
ENDS: tuple[End, ...] = ("replied", "dropped", "failed", "refused")
"""How a job ends: by a reply that is taken, a node that is gone or silent, an exception, a reply that does not pass."""


class Devices:
    """Counts of N devices.

    Args:
        num_clients: N.
    """

    def __init__(self, num_clients: int) -> None:
        self._counts = torch.zeros(len(ENDS), num_clients, dtype=torch.int64)
        self._seconds = torch.zeros(num_clients, dtype=torch.float64)
        self._logged: dict[str, Tensor] = {}  # {metric: [N] float64, NaN where a device has not logged it}

    def count(self, client: int, end: End) -> int:
        """Note the end of a job; how many of this client's ended so."""
        counts = self._counts[ENDS.index(end)]
        counts[client] += 1
        return int(counts[client])

    def replied(self, client: int, seconds: float, logged: Mapping[str, Tensor]) -> None:
        """Note a reply, how long it took, and its metrics, {name: [1]}."""
        self.count(client, "replied")
        self._seconds[client] += seconds
        for name, value in logged.items():
            unknown = torch.full_like(self._seconds, nan)
            self._logged.setdefault(name, unknown)[client] = value.double()[0]

    @property
    def mean_seconds(self) -> Tensor:
        """[N] float64: of a client's replies, NaN where there are none."""
        return self._seconds / self._counts[0]

    def columns(self) -> dict[str, Tensor]:
        """{what: [N]}, for people."""
        ends = dict(zip(ENDS, self._counts, strict=True))
        return ends | {"mean_seconds": self.mean_seconds} | {f"last.{k}": v for k, v in self._logged.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"counts": self._counts, "seconds": self._seconds, "logged": dict(self._logged)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._counts, self._seconds, self._logged = state["counts"], state["seconds"], dict(state["logged"])
