"""The simulator's fleet: virtual time decides which replies have arrived; they are computed when received.

Letters: N clients, R jobs or replies, P entries of a client's vector.

When and what are separate. `send` only books a finish time for each client. `receive` pops what is due and then
computes it together with every other job in flight whose inputs are known, whatever model each of them started
from, so that asynchronous runs still work on stacks. Client memory is written when a reply is received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.fleet import Cost, Fold, Replies, Work
from fedsim.memory import Memory
from fedsim.metrics import Metrics
from fedsim.sim.devices import Devices
from fedsim.sim.events import Event, EventQueue
from fedsim.sim.executor import Executor, Jobs, Results
from fedsim.streams import Streams

BITS_PER_NUMBER = 32
ONE_STEP = Cost()


@dataclass
class Sent:
    """What one call of `send` sent: the work's name, the broadcast, and the server step at that time."""

    work: str
    broadcast: Mapping[str, Any]
    round: int


@dataclass
class Ledger:
    """Bits sent so far by all clients, and to them."""

    bits_up: int = 0
    bits_down: int = 0


class SimFleet:
    """See the module's head.

    Args:
        num_examples: [N] samples of each client.
        model_size: P, for the cost of replies whose size is not given.
        executor: runs client halves.
        devices: durations of jobs.
        memory: rows that clients keep.
        seed: of the run.
    """

    def __init__(
        self,
        *,
        num_examples: Tensor,
        model_size: int,
        executor: Executor,
        devices: Devices,
        memory: Memory,
        seed: int,
    ) -> None:
        self.clients = torch.arange(len(num_examples))
        self.now = 0.0
        self.round = 0
        self.num_examples = num_examples
        self.memory = memory
        self.executor = executor
        self.ledger = Ledger()
        self.job_counts = torch.zeros(len(num_examples), dtype=torch.int64)
        self.queue = EventQueue()
        self.sent: dict[int, Sent] = {}
        self._observed = Metrics()
        self._devices, self._seed = devices, seed
        self._model_bits = BITS_PER_NUMBER * model_size
        self._in_flight = torch.zeros(len(num_examples), dtype=torch.bool)
        self._sequence = 0

    # The server half's side -------------------------------------------------------------------------------------

    def send(self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, **broadcast: Any) -> None:
        """Start work on idle clients.

        Raises:
            ValueError: if a client is still busy, unknown, or named twice.
        """
        self._check_idle(ids)
        numbers, finish = self._book(ids, cost, broadcast)
        self._in_flight[ids] = True
        key = self._sequence
        self.sent[key] = Sent(work.__name__, broadcast, self.round)
        rows = zip(finish.tolist(), ids.tolist(), numbers.tolist(), strict=True)
        self.queue.push(Event(f, key + i, c, n, key, self.now) for i, (f, c, n) in enumerate(rows))
        self._sequence += len(ids)

    def receive(self, *, until: float = inf, count: int | None = None) -> Replies:
        """Wait until a time, or for `count` replies, or (with neither) for all in flight; in order of arrival."""
        events = self.queue.pop(until, count)
        self._compute(events)
        if until < inf and (count is None or len(events) < count):
            self.now = max(self.now, until)
        elif events:
            self.now = max(self.now, events[-1].finish)
        replies = self._deliver(events)
        in_use = {e.sent for e in self.queue}
        self.sent = {k: v for k, v in self.sent.items() if k in in_use}
        return replies

    def ask(
        self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, fold: Fold | None = None, **broadcast: Any
    ) -> Replies:
        """Send to idle clients and wait for all of them; replies stand in the order of `ids`."""
        self._check_idle(ids)
        numbers, finish = self._book(ids, cost, broadcast)
        num_examples = self.num_examples[ids]
        weights = None
        if fold is not None:
            if not fold.foldable:
                raise ValueError(f"{type(fold).__name__} is not linear, so replies can't be folded; leave out fold=")
            weights = fold.weigh(num_examples)
        jobs = Jobs(
            work.__name__,
            ids,
            numbers,
            [broadcast],
            torch.zeros(len(ids), dtype=torch.int64),
            self.memory.read(ids),
            weights,
            self.round,
        )
        results = self.executor.run(jobs)
        self.memory.write(ids, results.memory)
        staleness = torch.zeros(len(ids), dtype=torch.int64)
        self._observe(ids, results.metrics, results.bits_up, staleness)
        if len(ids):
            self.now = max(self.now, float(finish.max()))
        return Replies(ids, num_examples, finish, {**results.fields, **results.sums}, staleness)

    # The loop's side --------------------------------------------------------------------------------------------

    def observations(self) -> Metrics:
        """What clients logged and how many replied since the last call."""
        seen, self._observed = self._observed, Metrics()
        return seen

    state_classes: ClassVar[dict[str, type]] = {"Event": Event, "Sent": Sent, "Ledger": Ledger}

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs: clock, counters, ledger, memory and the jobs in flight."""
        return {
            "now": self.now,
            "ledger": self.ledger,
            "job_counts": self.job_counts,
            "sequence": self._sequence,
            "queue": list(self.queue),
            "sent": dict(self.sent),
            "memory": self.memory.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.now, self.ledger, self.job_counts = state["now"], state["ledger"], state["job_counts"]
        self._sequence = state["sequence"]
        self.queue = EventQueue(state["queue"])
        self.sent = dict(state["sent"])
        self.memory.load(state["memory"])
        self._in_flight[:] = False
        self._in_flight[[e.client for e in self.queue]] = True

    # Inside -----------------------------------------------------------------------------------------------------

    def _check_idle(self, ids: Tensor) -> None:
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(self.clients)):
            raise ValueError(f"client ids must lie in 0..{len(self.clients) - 1}, got {ids.min()}..{ids.max()}")
        busy = ids[self._in_flight[ids]]
        if len(busy):
            raise ValueError(f"client {int(busy[0])} is still working; receive its reply before sending it more")
        if len(torch.unique(ids)) != len(ids):
            raise ValueError("a client was named twice in one call")

    def _book(self, ids: Tensor, cost: Cost, broadcast: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(job numbers [R], finish times [R]) of new jobs; counts what they download."""
        numbers = self.job_counts[ids]
        self.job_counts[ids] += 1
        down = sum(BITS_PER_NUMBER * (v.numel() if isinstance(v, Tensor) else 1) for v in broadcast.values())
        self.ledger.bits_down += down * len(ids)
        up = cost.vectors_up * self._model_bits if cost.bits_up is None else cost.bits_up
        steps = cost.steps_of(self.num_examples[ids])
        seconds = self._devices.seconds(
            Streams(self._seed, ids, numbers), steps, torch.full_like(steps, down), torch.full_like(steps, up)
        )
        return numbers, self.now + seconds

    def _compute(self, due: list[Event]) -> None:
        """Compute what is due and, in the same stacks, whatever else is in flight and not computed yet."""
        if all(e.result is not None for e in due):
            return
        pending = [e for e in (*due, *self.queue) if e.result is None]
        for work in dict.fromkeys(self.sent[e.sent].work for e in pending):
            events = [e for e in pending if self.sent[e.sent].work == work]
            keys = list(dict.fromkeys(e.sent for e in events))
            ids = torch.tensor([e.client for e in events])
            results = self.executor.run(
                Jobs(
                    work,
                    ids,
                    torch.tensor([e.number for e in events]),
                    [self.sent[k].broadcast for k in keys],
                    torch.tensor([keys.index(e.sent) for e in events]),
                    self.memory.read(ids),
                    round=self.round,
                    rounds=torch.tensor([self.sent[e.sent].round for e in events]),
                )
            )
            for i, event in enumerate(events):
                event.result = _row(results, i)

    def _deliver(self, events: list[Event]) -> Replies:
        ids = torch.tensor([e.client for e in events], dtype=torch.int64)
        self._in_flight[ids] = False
        rows = [e.result for e in events]
        stacked: dict[str, dict[str, Tensor]] = {"field": {}, "memory": {}, "metric": {}}
        for key in rows[0] if rows and rows[0] is not None else ():
            kind, _, name = key.partition("/")
            if kind in stacked:
                stacked[kind][name] = torch.stack([r[key] for r in rows if r is not None])
        self.memory.write(ids, stacked["memory"])
        bits = torch.tensor([int(r["bits"]) for r in rows if r is not None], dtype=torch.int64)
        staleness = torch.tensor([self.round - self.sent[e.sent].round for e in events], dtype=torch.int64)
        self._observe(ids, stacked["metric"], bits, staleness)
        return Replies(
            ids,
            self.num_examples[ids],
            torch.tensor([e.finish for e in events], dtype=torch.float64),
            dict(stacked["field"]),
            staleness,
        )

    def _observe(self, ids: Tensor, metrics: dict[str, Tensor], bits_up: Tensor, staleness: Tensor) -> None:
        self.ledger.bits_up += int(bits_up.sum())
        seen = Metrics.count(num_clients=len(ids))
        for name, values in metrics.items():
            seen += Metrics.mean_over(values, self.num_examples[ids], name=name)
        if len(ids) and bool((staleness > 0).any()) or "staleness_mean" in self._observed.means:
            seen += Metrics.mean_over(staleness, torch.ones(len(ids)), name="staleness_mean")
        self._observed += seen


def _row(results: Results, i: int) -> dict[str, Tensor]:
    """One job's part of the results, flat, so that a checkpoint can hold it."""
    row = {f"field/{k}": v[i] for k, v in results.fields.items()}
    row |= {f"memory/{k}": v[i] for k, v in results.memory.items()}
    row |= {f"metric/{k}": v[i] for k, v in results.metrics.items()}
    row["bits"] = results.bits_up[i]
    return row
