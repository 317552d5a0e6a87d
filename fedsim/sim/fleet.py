"""The simulator's fleet: virtual time decides which replies have arrived; they are computed when received.

Letters: N clients, R jobs or replies, P entries of a client's vector.

When and what are separate. `send` only books a finish time for each client. `receive` pops what is due and then
computes it together with jobs that will be due next, whatever model each of them started from, so that asynchronous
runs still work on full stacks. No more replies wait than these stacks hold; other jobs in flight are a few numbers each
and share what they were sent. Client memory is written when a reply is received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.compress.packet import FLOAT_BITS, Packet
from fedsim.fleet import Arrival, Cost, Fold, Inbox, Replies, Times, Work, weigh
from fedsim.memory import Memory
from fedsim.parts import Parts
from fedsim.sim.account import TOLERANCE, Account, bits_of, check_foldable
from fedsim.sim.byzantine import Byzantine, Knowledge, places, who_hears
from fedsim.sim.devices import Devices, law
from fedsim.sim.events import Event, EventQueue
from fedsim.sim.executor import Executor, Jobs, Results
from fedsim.sim.links import Downlink
from fedsim.streams import Streams

ONE_STEP = Cost()
STACKS_AHEAD = 4  # of a CPU, so that its cores have full ones while the last of a call is computed; one fills a GPU


def replies_ahead(width: int, stacks: int, device: torch.device) -> int:
    """How many replies of an asynchronous run may be computed before they are due: what a call's stacks hold."""
    return width * max(stacks, STACKS_AHEAD if device.type == "cpu" else 1)


class SimFleet(Account):
    """See the module's head.

    Args:
        num_examples: [N] samples of each client.
        model_size: P, for the cost of replies whose size is not given.
        executor: runs client halves.
        devices: durations of jobs.
        memory: rows that clients keep.
        seed: of the run.
        ahead: replies that may wait, computed before they are due.
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
        ahead: int = 64,
        reply_bits: int | None = None,
        downlink: Downlink | None = None,
        byzantine: Byzantine | None = None,
    ) -> None:
        super().__init__(num_examples, model_size, seed, downlink)
        self.now = 0.0
        self.memory, self.executor, self.byzantine = memory, executor, byzantine
        self.queue = EventQueue()
        self._devices, self._ahead = devices, ahead
        self._reply_bits = FLOAT_BITS * model_size if reply_bits is None else reply_bits
        self._durations: dict[int, tuple[tuple[float, float, float], Tensor]] = {}

    # The server half's side -------------------------------------------------------------------------------------

    def send(self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, **broadcast: Any) -> None:
        """Start work on idle clients.

        Raises:
            ValueError: if a client is still busy, unknown, or named twice.
        """
        if not len(ids):
            return
        numbers = self._number(ids)
        finish, broadcast = self._book(ids, numbers, cost, broadcast)
        start = self._sequence
        key = self._begin(ids, work, broadcast)
        rows = zip(finish.tolist(), ids.tolist(), numbers.tolist(), strict=True)
        self.queue.push(Event(f, start + i, c, n, key, self.now) for i, (f, c, n) in enumerate(rows))

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
        check_foldable(fold)
        numbers = self._number(ids)
        finish, broadcast = self._book(ids, numbers, cost, broadcast)
        num_examples = self.num_examples[ids]
        attacked = self.byzantine is not None and not bool(self.byzantine.honest(ids).all())
        early = None if fold is None or attacked else weigh(fold, num_examples)
        results = self._run(work, ids, numbers, broadcast, early)
        if len(ids):
            self.now = max(self.now, float(finish.max()))
        fields: dict[str, Any] = {**results.fields, **results.sums}
        arrive = torch.ones(len(ids), dtype=torch.bool)
        if attacked and self.byzantine is not None and cost.vectors_up:
            arrive, fields = self.byzantine.deliver(ids, fields, self.round)
        bits = results.bits_up if cost.vectors_up or cost.bits_up is not None else torch.zeros_like(results.bits_up)
        self._observe(ids, arrive, results.metrics, bits)
        ids, finish, num_examples = ids[arrive], finish[arrive], num_examples[arrive]
        if attacked and (fold is not None or not len(ids)):  # of no replies at all the sum is zero, folded or not
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
        vector = FLOAT_BITS * sum(v[0].numel() for v in sent.values() if v.ndim > 1)
        results = self._run(work, ids, numbers, broadcast, inbox=Inbox(sent, heard, places(present, n)))
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

    def job_times(self, cost: Cost, samples: int, messages: Tensor | None = None, **broadcast: Any) -> Times:
        """How long such a job takes (see `Fleet.job_times`); what must be drawn is, with keys that no real job has."""
        work = self._work(cost, messages, broadcast)
        jobs = torch.full_like(self.clients, -1)
        if (known := law(self._devices, Streams(self._seed, self.clients, jobs), *work)) is not None:
            return Times(*known)
        streams = [Streams(self._seed, self.clients, jobs - k) for k in range(samples)]
        drawn = torch.stack([self._devices.seconds(each, *work) for each in streams], dim=1)
        return Times(drawn.mean(1), torch.zeros(len(drawn), dtype=torch.float64), drawn)

    def _work(self, cost: Cost, messages: Tensor | None, broadcast: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(steps, bits down, bits up), [N] each, of a job once clients have a copy: what `_book` will count."""
        steps = cost.steps_of(self.num_examples)
        down = torch.zeros(len(steps), dtype=torch.int64)
        for value in broadcast.values():
            if self.downlink is not None and self._compresses(value):
                down += self.downlink.bits(self._model_size, torch.ones_like(down) if messages is None else messages)
            else:
                down += bits_of(value)
        return steps, down.double(), torch.full_like(steps, self._up(cost))

    # The loop's side --------------------------------------------------------------------------------------------

    state_classes: ClassVar[dict[str, type]] = Account.state_classes | {
        cls.__qualname__: cls for cls in (Event, Knowledge, Results, Parts)
    }

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs: the account, the clock, memory, the jobs in flight, and replies that wait."""
        waiting = self._keep_only_what_waits()
        return super().state() | {
            "now": self.now,
            "queue": [replace(event, result=None) for event in self.queue],
            "waiting": [event.sequence for event in waiting],
            "replies": Results.together([event.result for event in waiting if event.result is not None]),
            "memory": self.memory.state(),
            "known": {} if self.byzantine is None else self.byzantine.known,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load(state)
        self.now, self.queue = state["now"], EventQueue(state["queue"])
        events, replies = {e.sequence: e for e in self.queue}, state["replies"]
        for sequence, reply in zip(state["waiting"], replies.apart(), strict=True):
            events[sequence].result = reply
        self.memory.load(state["memory"])
        if self.byzantine is not None:
            self.byzantine.known = dict(state["known"])
        self._busy[:] = False
        self._busy[[e.client for e in self.queue]] = True

    # Inside -----------------------------------------------------------------------------------------------------

    def _book(
        self, ids: Tensor, numbers: Tensor, cost: Cost, broadcast: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """(finish times [R], what clients get) of new jobs; counts what they download."""
        down, received = torch.zeros(len(ids), dtype=torch.int64), dict[str, Any]()
        for name, value in broadcast.items():
            if self.downlink is not None and self._compresses(value):
                received[name], bits, _ = self.downlink.send(name, value, ids, len(self.clients))
                down += bits
            else:
                received[name] = value.decode()[0] if isinstance(value, Packet) else value
                down += bits_of(value)
        self.ledger.bits_down += int(down.sum())
        steps = cost.steps_of(self.num_examples[ids])
        up = torch.full_like(steps, self._up(cost))
        return self.now + self._seconds(ids, numbers, steps, down.double(), up), received

    def _run(
        self,
        work: Work,
        ids: Tensor,
        numbers: Tensor,
        broadcast: Mapping[str, Any],
        weights: Tensor | None = None,
        inbox: Inbox | None = None,
    ) -> Results:
        """Jobs that all start from one broadcast, at once; what they keep is written."""
        which, kept = torch.zeros(len(ids), dtype=torch.int64), self.memory.of(ids)
        jobs = Jobs(work.__name__, ids, numbers, [broadcast], which, kept, weights, self.round, inbox=inbox)
        results = self.executor.run(jobs)
        self.memory.write(ids, results.memory)
        return results

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
        whole = exact * self._model_size + cost.scalars_up
        return (cost.vectors_up - exact) * self._reply_bits + whole * FLOAT_BITS

    def _compute(self, due: list[Event]) -> None:
        """Compute what is due and, in the same stacks, what will be due next, as long as no more than `ahead` wait."""
        missing = [e for e in due if e.result is None]
        if not missing:
            return
        waiting, coming = list[Event](), list[Event]()
        for event in self.queue:
            (coming if event.result is None else waiting).append(event)
        pending = missing + coming[: max(self._ahead - len(waiting) - len(missing), 0)]
        pending.sort(key=lambda e: e.sequence)
        for work in dict.fromkeys(self.sent[e.sent].work for e in pending):
            self._run_events(work, [e for e in pending if self.sent[e.sent].work == work])
        if _rows_held(waiting) > 2 * self._ahead:
            self._keep_only_what_waits()

    def _run_events(self, work: str, events: list[Event]) -> None:
        """Compute jobs in flight that do the same work."""
        keys = {key: i for i, key in enumerate(dict.fromkeys(e.sent for e in events))}
        ids = torch.tensor([e.client for e in events])
        results = self.executor.run(
            Jobs(
                work,
                ids,
                torch.tensor([e.number for e in events]),
                [self.sent[key].broadcast for key in keys],
                torch.tensor([keys[e.sent] for e in events]),
                self.memory.of(ids),
                round=self.round,
                rounds=torch.tensor([self.sent[e.sent].round for e in events]),
            )
        )
        for event, result in zip(events, results.apart(), strict=True):
            event.result = result

    def _keep_only_what_waits(self) -> list[Event]:
        """The events whose replies wait; these become copies, so that the rest of their stacks takes no room."""
        waiting = [e for e in self.queue if e.result is not None]
        replies = Results.together([e.result for e in waiting if e.result is not None])
        for event, reply in zip(waiting, replies.apart(), strict=True):
            event.result = reply
        return waiting

    def _deliver(self, events: list[Event]) -> Replies:
        ids, finish, staleness = self._end((e.client, e.sent, e.started, e.finish) for e in events)
        results = Results.together([e.result for e in events if e.result is not None])
        self.memory.write(ids, results.memory)
        fields, arrive = dict(results.fields), torch.ones(len(ids), dtype=torch.bool)
        if self.byzantine is not None:
            arrive, fields = self.byzantine.deliver(ids, fields, self.round)
        self._observe(ids, arrive, results.metrics, results.bits_up, staleness)
        ids, finish, staleness = ids[arrive], finish[arrive], staleness[arrive]
        return Replies(ids, self.num_examples[ids], finish, fields, staleness)


def _rows_held(events: list[Event]) -> int:
    """Rows of all the stacks to which computed replies belong."""
    stacks = {id(e.result.fields[0]): e.result.fields[0] for e in events if e.result and e.result.fields}
    return sum(len(next(iter(fields.values()))) for fields in stacks.values())
