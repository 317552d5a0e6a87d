"""A cohort: the stack of clients that a client half works on.

Letters: C clients, P entries of a client's vector.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim import pages
from fedsim.memory import MemoryRows
from fedsim.streams import Streams
from fedsim.task import Task


@dataclass
class Cohort:
    """What a client half sees: who, which task, what they remember, and their random numbers.

    Args:
        ids: [C] on the host, client ids, those with the most samples first; on the device they are `streams.clients`.
        task: gives batches and the field (gradient or operator) of these clients.
        memory: rows that these clients keep between rounds.
        streams: keyed by (seed, purpose, client, job).
        device: where the stack's tensors live.
        rounds: [C] on the host, the server step at which each was given this work.
        pool: of the worker, for `scratch`.
    """

    ids: Tensor
    task: Task
    memory: MemoryRows
    streams: Streams
    device: torch.device
    rounds: Tensor
    pool: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_examples(self) -> Tensor:
        """[C] int64 on the host: samples of each client."""
        return self.task.num_examples[self.ids]

    def log(self, **values: Tensor) -> None:
        """Diagnostics [C], averaged over clients by their number of samples; they are not counted as traffic.

        Raises:
            ValueError: for a metric that is not one number for each client.
        """
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape != (len(self),):
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"metric {name!r} needs one number for each client, [{len(self)}], got {found}")
        self.metrics.update(values)

    def scratch(self, name: str, like: Tensor) -> Tensor:
        """[C, P] uninitialised, in the worker's own pool: the next stack writes over it, so nothing may leave in it."""
        shape = (len(self), like.shape[-1])
        found = self.pool.get(name)
        if found is None or found.shape[0] < shape[0] or found.shape[1] != shape[1] or found.dtype != like.dtype:
            found = self.pool[name] = pages.empty(shape, like.dtype, self.device)
        return found[: shape[0]]
