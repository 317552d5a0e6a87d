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

from fedsim.compress.packet import Packet
from fedsim.fleet import Arrival, Cost, Fold, Replies, Work, weigh
from fedsim.memory import Memory
from fedsim.metrics import Metrics
from fedsim.sim.byzantine import Byzantine, Knowledge, places, who_hears
from fedsim.sim.devices import Devices, law
from fedsim.sim.events import Event, EventQueue, Sent
from fedsim.sim.executor import Executor, Jobs, Results
from fedsim.sim.links import Copy, Downlink
from fedsim.streams import Streams

BITS_PER_NUMBER = 32
ONE_STEP = Cost()
TIMELINE = 5000  # jobs that the report's timeline shows
UNHEARD = 256  # replies whose metrics wait to be added up
TOLERANCE = 1e-9  # seconds: a job that ends with the window counts, whatever its sum of floats says


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
        reply_bits: bits of one model-sized vector on the way up; 32 P unless the uplink compresses.
        downlink: compresses broadcasts; None sends them as they are.
        byzantine: who lies, and how; None for nobody.
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
        reply_bits: int | None = None,
        downlink: Downlink | None = None,
        byzantine: Byzantine | None = None,
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
        self._heard: dict[str, list[tuple[Tensor, Tensor]]] = {}  # {metric: (values [R], weights [R]) of each reply}
        self._devices, self._seed = devices, seed
        self._model_size = model_size
        self._reply_bits = BITS_PER_NUMBER * model_size if reply_bits is None else reply_bits
        self.downlink, self.byzantine = downlink, byzantine
        self.timeline: list[tuple[int, float, float, int]] = []
        self._in_flight = torch.zeros(len(num_examples), dtype=torch.bool)
        self._sequence = 0
        self._durations: dict[int, tuple[tuple[float, float, float], Tensor]] = {}

    # The server half's side -------------------------------------------------------------------------------------

    def send(self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, **broadcast: Any) -> None:
        """Start work on idle clients.

        Raises:
            ValueError: if a client is still busy, unknown, or named twice.
        """
        if not len(ids):
            return
        self._check_idle(ids)
        numbers, finish, broadcast = self._book(ids, work, cost, broadcast)
        self._in_flight[ids] = True
        key = self._key_of(Sent(work.__name__, broadcast, self.round), len(ids))
        rows = zip(finish.tolist(), ids.tolist(), numbers.tolist(), strict=True)
        start = self._sequence
        self.queue.push(Event(f, start + i, c, n, key, self.now) for i, (f, c, n) in enumerate(rows))
        self._sequence += len(ids)

    def receive(self, *, until: float = inf, count: int | None = None) -> Replies:
        """Wait until a time, or for `count` replies, or (with neither) for all in flight; in order of arrival."""
        events = self.queue.pop(until + TOLERANCE, count)
        self._compute(events)
        if until < inf and (count is None or len(events) < count):
            self.now = max(self.now, until)
        elif events:
            self.now = max(self.now, events[-1].finish)
        return self._deliver(events)

    def ask(
        self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, fold: Fold | None = None, **broadcast: Any
    ) -> Replies:
        """Send to idle clients and wait for all of them; replies stand in the order of `ids`."""
        self._check_idle(ids)
        numbers, finish, broadcast = self._book(ids, work, cost, broadcast)
        num_examples = self.num_examples[ids]
        if fold is not None and not fold.foldable:
            raise ValueError(f"{type(fold).__name__} is not linear, so replies can't be folded; leave out fold=")
        lies = self.byzantine is not None and not bool(self.byzantine.honest(ids).all())
        early = None if fold is None or lies else weigh(fold, num_examples)
        kept = self.memory.of(ids)
        results = self.executor.run(_jobs(work, ids, numbers, broadcast, kept, early, self.round))
        self.memory.write(ids, results.memory)
        if len(ids):
            self.now = max(self.now, float(finish.max()))
        fields: dict[str, Any] = {**results.fields, **results.sums}
        arrive = torch.ones(len(ids), dtype=torch.bool)
        if lies and self.byzantine is not None and cost.vectors_up:
            arrive, fields = self.byzantine.deliver(ids, fields, self.round)
        bits = results.bits_up if cost.vectors_up or cost.bits_up is not None else torch.zeros_like(results.bits_up)
        self._observe(ids, arrive, results.metrics, bits)
        ids, finish, num_examples = ids[arrive], finish[arrive], num_examples[arrive]
        if lies and (fold is not None or not len(ids)):  # of no replies at all the sum is zero, folded or not
            late = torch.zeros(0) if fold is None else weigh(fold, num_examples)
            fields = {k: torch.tensordot(late.to(v), v, dims=1) if v.ndim > 1 else v for k, v in fields.items()}
        return Replies(ids, num_examples, finish, fields, torch.zeros(len(ids), dtype=torch.int64))

    def exchange(
        self, replies: Replies, work: Work, *, arrival: Arrival = "all", missing: int = 0, **broadcast: Any
    ) -> Replies:
        """Every client of `replies` reads the others' vectors (see `Fleet.exchange`); each sends n - 1 copies."""
        ids, n = replies.ids, len(replies)
        sent = dict(replies.fields)
        if self.byzantine is not None:
            arrive, sent = self.byzantine.deliver(ids, sent, self.round)
        else:
            arrive = torch.ones(n, dtype=torch.bool)
        present = torch.nonzero(arrive).flatten()
        numbers = self.job_counts[ids] - 1  # the second half of the job whose reply is exchanged
        streams = Streams(self._seed, ids, numbers)
        heard = who_hears(streams, present, self.honest(ids[present]), missing if arrival == "adversarial" else 0)
        vector = BITS_PER_NUMBER * sum(v[0].numel() for v in sent.values() if v.ndim > 1)
        memory = self.memory.read(ids) | {"inbox/heard": heard, "inbox/own": places(present, n)}
        model = {**broadcast, **{f"inbox/{k}": v for k, v in sent.items()}}
        results = self.executor.run(_jobs(work, ids, numbers, model, memory, None, self.round))
        self.memory.write(ids, results.memory)
        up, down = torch.full((n,), vector * (n - 1)), vector * (len(present) - arrive.long())
        self.ledger.bits_down += int(down.sum())
        self._observe(ids, arrive, results.metrics, up, count=False)
        seconds = self._devices.seconds(streams, torch.zeros(n).double(), down.double(), up.double())
        finish = self.now + seconds
        self.now = max(self.now, float(finish.max()))
        return Replies(ids, self.num_examples[ids], finish, dict(results.fields), torch.zeros(n, dtype=torch.int64))

    def honest(self, ids: Tensor) -> Tensor:
        """[R] bool: which of these clients are honest."""
        return torch.ones(len(ids), dtype=torch.bool) if self.byzantine is None else self.byzantine.honest(ids)

    def job_seconds(self, cost: Cost, samples: int = 1, **broadcast: Any) -> Tensor:
        """[N, samples] float64 seconds of such a job, drawn with keys that no real job has."""
        columns = []
        for k in range(samples if self._devices.random else 1):
            streams = Streams(self._seed, self.clients, torch.full_like(self.clients, -1 - k))
            columns.append(self._devices.seconds(streams, *self._work(cost, broadcast)))
        return torch.stack(columns, dim=1)

    def job_law(self, cost: Cost, **broadcast: Any) -> tuple[Tensor, Tensor] | None:
        """([N] seconds at least, [N] mean of an exponential rest) of such a job; None where it must be drawn."""
        streams = Streams(self._seed, self.clients, torch.full_like(self.clients, -1))
        return law(self._devices, streams, *self._work(cost, broadcast))

    def _work(self, cost: Cost, broadcast: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(steps [N], bits down [N], bits up [N]) of a job that any client may be sent."""
        steps = cost.steps_of(self.num_examples)
        return steps, torch.full_like(steps, _bits(broadcast)), torch.full_like(steps, self._up(cost))

    # The loop's side --------------------------------------------------------------------------------------------

    def observations(self) -> Metrics:
        """What clients logged and how many replied since the last call."""
        self._add_up()
        seen, self._observed = self._observed, Metrics()
        return seen

    state_classes: ClassVar[dict[str, type]] = {
        "Event": Event,
        "Sent": Sent,
        "Ledger": Ledger,
        "Knowledge": Knowledge,
        "Copy": Copy,
    }

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
            "timeline": torch.tensor(self.timeline, dtype=torch.float64).view(-1, 4),
            "known": {} if self.byzantine is None else self.byzantine.known,
            "copies": {} if self.downlink is None else self.downlink.copies,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.now, self.ledger, self.job_counts = state["now"], state["ledger"], state["job_counts"]
        self._sequence = state["sequence"]
        self.queue = EventQueue(state["queue"])
        self.sent = dict(state["sent"])
        self.memory.load(state["memory"])
        self.timeline = [(int(c), a, b, int(r)) for c, a, b, r in state["timeline"].tolist()]
        if self.byzantine is not None:
            self.byzantine.known = dict(state["known"])
        if self.downlink is not None:
            self.downlink.copies = dict(state["copies"])
        self._in_flight[:] = False
        self._in_flight[[e.client for e in self.queue]] = True

    # Inside -----------------------------------------------------------------------------------------------------

    def _check_idle(self, ids: Tensor) -> None:
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(self.clients)):
            raise ValueError(f"client ids must lie in 0..{len(self.clients) - 1}, got {ids.min()}..{ids.max()}")
        busy = ids[self._in_flight[ids]]
        if len(busy):
            raise ValueError(f"client {int(busy[0])} is still working; receive its reply before sending it more")
        if len(ids) > 1 and len(torch.unique(ids)) != len(ids):
            raise ValueError("a client was named twice in one call")

    def _book(
        self, ids: Tensor, work: Work, cost: Cost, broadcast: dict[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(job numbers [R], finish times [R], what clients get) of new jobs; counts what they download."""
        numbers = self.job_counts[ids]
        self.job_counts[ids] += 1
        down, same = torch.zeros(len(ids), dtype=torch.int64), 0  # bits to each client, and to every client
        received: dict[str, Any] = {}
        for name, value in broadcast.items():
            if isinstance(value, Packet):  # what the strategy compressed itself
                received[name] = value.decode()[0]
                same += int(value.bits[0])
            elif self.downlink is not None and isinstance(value, Tensor) and value.numel() == self._model_size:
                received[name], bits = self.downlink.send(name, value, ids, len(self.clients))
                down += bits
            else:
                received[name] = value
                same += _bits({name: value})
        down += same
        self.ledger.bits_down += int(down.sum())
        steps = cost.steps_of(self.num_examples[ids])
        up = torch.full_like(steps, self._up(cost))
        return numbers, self.now + self._seconds(ids, numbers, steps, down.double(), up), received

    def _seconds(self, ids: Tensor, numbers: Tensor, steps: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """[R] durations of jobs; those of clients that are sent work one by one are looked up where they never vary."""
        if self._devices.random or len(ids) > 1:
            return self._devices.seconds(Streams(self._seed, ids, numbers), steps, down, up)
        client, work = int(ids), (float(steps), float(down), float(up))
        known = self._durations.get(client)
        if known is None or known[0] != work:
            known = work, self._devices.seconds(Streams(self._seed, ids, numbers), steps, down, up)
            self._durations[client] = known
        return known[1]

    def _up(self, cost: Cost) -> int:
        """Bits of a reply."""
        if cost.bits_up is not None:
            return cost.bits_up
        exact = min(cost.exact_up, cost.vectors_up)
        return (cost.vectors_up - exact) * self._reply_bits + exact * BITS_PER_NUMBER * self._model_size

    def _key_of(self, sent: Sent, jobs: int) -> int:
        """Where new jobs find what they were sent; calls that send the same one after the other share one entry."""
        key = max(self.sent, default=-1)
        if key < 0 or not self.sent[key].same_as(sent):
            key = self._sequence
            self.sent[key] = sent
        self.sent[key].open += jobs
        return key

    def _forget(self, delivered: list[Event]) -> None:
        """Let go of what nobody is working on any more."""
        for event in delivered:
            sent = self.sent[event.sent]
            sent.open -= 1
            if not sent.open:
                del self.sent[event.sent]

    def _compute(self, due: list[Event]) -> None:
        """Compute what is due and, in the same stacks, whatever else is in flight and not computed yet."""
        if all(e.result is not None for e in due):
            return
        pending = sorted((e for e in (*due, *self.queue) if e.result is None), key=lambda e: e.sequence)
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
                    self.memory.of(ids),
                    round=self.round,
                    rounds=torch.tensor([self.sent[e.sent].round for e in events]),
                )
            )
            for event, result in zip(events, results.apart(), strict=True):
                event.result = result

    def _deliver(self, events: list[Event]) -> Replies:
        ids = torch.tensor([e.client for e in events], dtype=torch.int64)
        self._in_flight[ids] = False
        results = Results.together([e.result for e in events if e.result is not None])
        for e in events:
            if len(self.timeline) < TIMELINE:
                self.timeline.append((e.client, e.started, e.finish, self.round + 1))
        self.memory.write(ids, results.memory)
        staleness = torch.tensor([self.round - self.sent[e.sent].round for e in events], dtype=torch.int64)
        finish = torch.tensor([e.finish for e in events], dtype=torch.float64)
        fields, arrive = dict(results.fields), torch.ones(len(ids), dtype=torch.bool)
        if self.byzantine is not None:
            arrive, fields = self.byzantine.deliver(ids, fields, self.round)
        self._observe(ids, arrive, results.metrics, results.bits_up, staleness)
        self._forget(events)
        ids, finish, staleness = ids[arrive], finish[arrive], staleness[arrive]
        return Replies(ids, self.num_examples[ids], finish, fields, staleness)

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


def _jobs(
    work: Work,
    ids: Tensor,
    numbers: Tensor,
    model: Mapping[str, Any],
    memory: Mapping[str, Tensor],
    weights: Tensor | None,
    round: int,
) -> Jobs:
    """Jobs that all start from one broadcast."""
    which = torch.zeros(len(ids), dtype=torch.int64)
    return Jobs(work.__name__, ids, numbers, [model], which, memory, weights, round)


def _bits(broadcast: Mapping[str, Any]) -> int:
    """Bits of a broadcast sent as it is: 32 a number, one for a yes or no."""
    present = [v for v in broadcast.values() if v is not None]
    plain = sum(1 if isinstance(v, bool) else BITS_PER_NUMBER for v in present if not isinstance(v, Tensor))
    return plain + sum(BITS_PER_NUMBER * v.numel() for v in present if isinstance(v, Tensor))
