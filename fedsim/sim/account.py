"""The account that every fleet keeps: who is busy with what, what travelled, what clients said, and the rounds.

Fleets differ in transport and clock alone: `fedsim.sim.fleet` and `fedsim.flower.fleet`.

Letters: N clients, R jobs or replies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.compress.packet import FLOAT_BITS, Packet
from fedsim.fleet import Fold, Held, Work
from fedsim.graph import Graph, Topology
from fedsim.metrics import Metrics
from fedsim.sim.events import Sent
from fedsim.sim.links import Copy, Downlink

TIMELINE = 5000  # jobs that the report's timeline shows
UNHEARD = 256  # replies whose metrics wait to be added up
TOLERANCE = 1e-9  # seconds: a job that ends with the window counts, whatever its sum of floats says


@dataclass
class Ledger:
    """Bits sent so far by all clients, and to them."""

    bits_up: int = 0
    bits_down: int = 0


class Account:
    """See the module's head.

    Args:
        num_examples: [N] samples of each client.
        model_size: P, the size of vectors that the downlink compresses.
        seed: of the run.
        downlink: compresses broadcasts; None sends them as they are.
    """

    def __init__(self, num_examples: Tensor, model_size: int, seed: int, downlink: Downlink | None) -> None:
        self.num_examples = num_examples
        self.clients = torch.arange(len(num_examples))
        self.round = 0
        self.ledger = Ledger()
        self.job_counts = torch.zeros(len(num_examples), dtype=torch.int64)
        self.sent: dict[int, Sent] = {}
        self.timeline: list[tuple[int, float, float, int]] = []
        self.downlink = downlink
        self._model_size, self._seed = model_size, seed
        self._busy = torch.zeros(len(num_examples), dtype=torch.bool)
        self._sequence = 0  # of the next job
        self._observed = Metrics()
        self._heard: dict[str, list[tuple[Tensor, Tensor]]] = {}  # {metric: (values [R], weights [R]) of each reply}

    state_classes: ClassVar[dict[str, type]] = {"Sent": Sent, "Ledger": Ledger, "Copy": Copy}

    def devices(self) -> Mapping[str, Tensor]:
        """{what: [N]} of each client's device; nothing of those that are only simulated."""
        return {}

    def end_round(self) -> Metrics:
        """What clients logged and how many replied since the last call; the next round begins."""
        self._add_up()
        self.round += 1
        seen, self._observed = self._observed, Metrics()
        return seen

    def present(self, at_least: int = 1, with_data: bool = False) -> Tensor:
        """[A] idle clients, in ascending order: all of them are on line, as far as anybody knows.

        Raises:
            ValueError: if there are not so many clients.
        """
        ids = torch.nonzero(~self._busy).flatten() if self.sent else self.clients
        ids = ids[self.num_examples[ids] > 0] if with_data else ids
        if len(ids) < at_least and not self.sent:
            raise ValueError(f"{at_least} clients are needed at once, and there are {len(ids)}; raise clients.count")
        return ids

    def graph(self, topology: Topology) -> Graph:
        """Who would hear whom among all clients in this round."""
        return topology.graph(len(self.clients), self._seed, self.round)

    def honest(self, ids: Tensor) -> Tensor:
        """[R] bool: all of them, as far as anybody knows."""
        return torch.ones(len(ids), dtype=torch.bool)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of it."""
        return {
            "round": self.round,
            "ledger": self.ledger,
            "job_counts": self.job_counts,
            "sequence": self._sequence,
            "sent": dict(self.sent),
            "timeline": torch.tensor(self.timeline, dtype=torch.float64).view(-1, 4),
            "copies": {} if self.downlink is None else self.downlink.copies,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.round, self.ledger, self.job_counts = state["round"], state["ledger"], state["job_counts"]
        self._sequence, self.sent = state["sequence"], dict(state["sent"])
        self.timeline = [(int(c), a, b, int(r)) for c, a, b, r in state["timeline"].tolist()]
        if self.downlink is not None:
            self.downlink.copies = dict(state["copies"])

    # Jobs -------------------------------------------------------------------------------------------------------

    def _number(self, ids: Tensor, second: bool = False) -> Tensor:
        """[R] job indices of new jobs, or of those that clients had last, whose second halves these are.

        Raises:
            ValueError: if a client is still busy, unknown, or named twice, or has had no job to go on with.
        """
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(self.clients)):
            raise ValueError(f"client ids must lie in 0..{len(self.clients) - 1}, got {ids.min()}..{ids.max()}")
        busy = ids[self._busy[ids]]
        if len(busy):
            raise ValueError(f"client {int(busy.min())} is still working; receive its reply before sending it more")
        if len(ids) > 1 and len(torch.unique(ids)) != len(ids):
            raise ValueError("a client was named twice in one call")
        if second and not bool(self.job_counts[ids].all()):
            raise ValueError("a client that was never sent anything holds nothing; ask it first")
        self.job_counts[ids] += not second
        return self.job_counts[ids] - 1

    def _begin(self, ids: Tensor, work: Work, broadcast: Mapping[str, Any]) -> int:
        """Where new jobs find what they were sent; calls that send the same one after the other share one entry."""
        sent = Sent(work.__name__, broadcast, self.round)
        key = max(self.sent, default=-1)
        if key < 0 or not self.sent[key].same_as(sent):
            key = self._sequence
            self.sent[key] = sent
        self.sent[key].open += len(ids)
        self._sequence += len(ids)
        self._busy[ids] = True
        return key

    def _end(self, jobs: Iterable[tuple[int, int, float, float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take jobs (client, where it found what it was sent, start, end) off: [R] ids, ends, staleness and seconds."""
        ids, ends, staleness, seconds = [], [], [], []
        for client, key, start, end in jobs:
            sent = self.sent[key]
            ids.append(client)
            ends.append(end)
            seconds.append(end - start)
            staleness.append(self.round - sent.round)
            if len(self.timeline) < TIMELINE:
                self.timeline.append((client, start, end, self.round + 1))
            sent.open -= 1
            if not sent.open:  # nobody is working on it any more
                del self.sent[key]
        self._busy[ids] = False
        return (
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(ends, dtype=torch.float64),
            torch.tensor(staleness, dtype=torch.int64),
            torch.tensor(seconds, dtype=torch.float64),
        )

    # What travelled and what was said ---------------------------------------------------------------------------

    def _compresses(self, value: Any) -> bool:
        """Whether the downlink compresses a value of a broadcast."""
        return self.downlink is not None and isinstance(value, Tensor) and value.numel() == self._model_size

    def _as_held(self, name: str, held: Held) -> Tensor:
        """What clients got when they were sent this vector."""
        if self.downlink is None or not self._compresses(held.value):
            return held.value
        return self.downlink.copies[name].value

    def _observe(
        self,
        ids: Tensor,
        arrive: Tensor,
        metrics: Mapping[str, Tensor],
        bits_up: Tensor,
        staleness: Tensor | None = None,
        count: bool = True,
    ) -> None:
        """Note what the replies that arrive [R] bool cost and say."""
        self.ledger.bits_up += int(bits_up[arrive].sum())
        weights = self.num_examples[ids][arrive]
        for name, values in metrics.items():
            self._heard.setdefault(name, []).append((values[arrive], weights))
        if staleness is not None and len(weights):
            self._heard.setdefault("staleness_mean", []).append((staleness[arrive], torch.ones_like(weights)))
        self._observed += Metrics.count(num_clients=len(weights) if count else 0)
        if any(len(heard) > UNHEARD for heard in self._heard.values()):
            self._add_up()

    def _add_up(self) -> None:
        """The means of what was noted, taken for many replies at once: that is most of what one arrival would cost."""
        for name, heard in self._heard.items():
            values, weights = (torch.cat(parts) for parts in zip(*heard, strict=True))
            self._observed += Metrics.mean_over(values, weights, name=name)
        self._heard = {}


def is_second_half(broadcast: Mapping[str, Any]) -> bool:
    """Whether jobs with this broadcast are the second halves of those that their clients had last."""
    return any(isinstance(value, Held) for value in broadcast.values())


def check_foldable(fold: Fold | None) -> None:
    """Refuse to fold by a rule that is not linear."""
    if fold is not None and not fold.foldable:
        raise ValueError(f"{type(fold).__name__} is not linear, so replies can't be folded; leave out fold=")


def bits_of(value: Any) -> int:
    """Bits of one value: 32 a number or an entry, 1 a yes or no, 0 None, and of a packet of one row its encoding's."""
    if value is None or isinstance(value, bool):
        return int(value is not None)
    if isinstance(value, Packet):
        return int(value.bits[0])
    return FLOAT_BITS * (value.numel() if isinstance(value, Tensor) else 1)
