"""The simulator's fleet: virtual time decides which replies have arrived; they are computed when received.

Letters: N clients, R jobs or replies, P entries of a client's vector.

When and what are separate. `send` only books a finish time for each client. `receive` pops what is due and then
computes it together with jobs that will be due next (`ahead`); other jobs in flight are a few numbers each and share
what they were sent. Client memory is written when a reply is received. A job that dies is an event as well, at which
its client is idle again; it is never computed, and neither is a late reply that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.compress.packet import FLOAT_BITS, Packet
from fedsim.fleet import Cost, Fold, Held, Late, Replies, Times, Work, weigh
from fedsim.graph import Graph, Inbox, everybody
from fedsim.memory import Memory
from fedsim.metrics import Metrics
from fedsim.parts import Parts
from fedsim.sim.absence import Absence, Ends
from fedsim.sim.account import TOLERANCE, Account, bits_of, check_foldable, is_second_half
from fedsim.sim.ahead import compute, packed, unpacked
from fedsim.sim.byzantine import Byzantine, Knowledge, held_back
from fedsim.sim.calls import Calls, of_those
from fedsim.sim.devices import Devices
from fedsim.sim.events import Event, EventQueue
from fedsim.sim.executor import Executor, Jobs, Results
from fedsim.sim.links import Downlink
from fedsim.sim.timing import Timing, least
from fedsim.streams import Streams

ONE_STEP, PRESENT = Cost(), Absence()
DRAWS = 64  # durations of each client by which a deadline is judged, where no law is known


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
        absence: who is off line when, and which jobs die.
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
        absence: Absence = PRESENT,
    ) -> None:
        super().__init__(num_examples, model_size, seed, downlink)
        self.now = 0.0
        self.absence = absence
        self.memory, self.byzantine = memory, byzantine
        self._calls = Calls(executor, memory)
        self.queue = EventQueue()
        bits = FLOAT_BITS * model_size if reply_bits is None else reply_bits
        self.timing = Timing(devices, absence, num_examples, model_size, bits, seed)
        self._ahead = ahead

    @property
    def executor(self) -> Executor:
        """Where client halves run."""
        return self._calls.executor

    # The server half's side -------------------------------------------------------------------------------------

    @property
    def num_at_work(self) -> int:
        """Jobs in flight."""
        return len(self.queue)

    def present(self, at_least: int = 1, with_data: bool = False) -> Tensor:
        """[A] clients that are on line and idle, in ascending order (see `Fleet.present`).

        Raises:
            ValueError: if so many will never be there.
        """
        ids = super().present(at_least, with_data)
        if not self.absence.away:
            return ids
        if len(self.queue):
            on = self.absence.on_line(ids, self.now)
        else:
            self.now, on = self.absence.wait(ids, self.now, at_least)
        self._observed += Metrics(means={"num_away": (float(len(ids) - int(on.sum())), 1.0)})
        return ids[on]

    def send(self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, **broadcast: Any) -> None:
        """Start work on idle clients; those that are off line by now don't get it.

        Raises:
            ValueError: if a client is still busy, unknown, or named twice.
        """
        ids = ids[self._reachable(ids)]
        if len(ids):
            numbers = self._number(ids)
            self._enqueue(ids, numbers, work, *self._book(ids, numbers, cost, broadcast))

    def receive(self, *, until: float = inf, count: int | None = None) -> Replies:
        """Wait until a time, or for `count` replies, or (with neither) for all in flight; in order of arrival."""
        ended = self.queue.pop(until + TOLERANCE, count)
        events = [e for e in ended if e.lost < 0]
        compute(events, self.queue, self._ahead, self._calls, self.sent, self.round)
        if until < inf and (count is None or len(events) < count):
            self.now = max(self.now, until)
        elif ended:
            self.now = max(self.now, ended[-1].finish)
        self._bury([e for e in ended if e.lost >= 0])
        return self._deliver(events)

    def cancel(self, ids: Tensor) -> None:
        """Call off jobs in flight (see `Fleet.cancel`); nothing of them is uploaded, counted or kept."""
        clients = set(ids.tolist())
        self._end((e.client, e.sent, e.started, self.now) for e in self.queue.take(lambda e: e.client in clients))

    def ask(
        self,
        ids: Tensor,
        work: Work,
        *,
        cost: Cost = ONE_STEP,
        fold: Fold | None = None,
        weights: Tensor | None = None,
        within: float = inf,
        first: int | None = None,
        late: Late = "drop",
        **broadcast: Any,
    ) -> Replies:
        """Send to idle clients and wait for them; replies stand in the order of `ids` (see `Fleet.ask`).

        Raises:
            ValueError: if a client is still busy, unknown, or named twice, or nobody's job can end within that time.
        """
        check_foldable(fold)
        there, started = self._reachable(ids), self.now
        ids, weights = ids[there], None if weights is None else weights[there]
        second = is_second_half(broadcast)
        numbers = self._number(ids, second)
        ends, received = self._book(ids, numbers, cost, broadcast, second)
        close = min(ends.closing(first) if len(ids) else self._next(work.__name__), self.now + within)
        ended = ends.at <= close + TOLERANCE
        came, died = ended & ends.well, ended & ~ends.well
        if not cost.answers and (within < inf or first is not None):
            self._observed += Metrics.count(num_late=int((~ended).sum()))
        if late == "keep" and not bool(ended.all()):
            self._enqueue(ids[~ended], numbers[~ended], work, Ends(ends.at[~ended], ends.lost[~ended]), received)
        if bool(died.any()):
            self._lose(ends.lost[died])
        kept = self._kept(work.__name__, close)
        if within < inf and len(ids) and not kept and not bool((self.num_examples[ids[came]] > 0).any()):
            self.check_possible(cost, within, **broadcast)
        self.now = max(self.now, close)
        assert weights is None or not kept, "weights are of the clients asked now"
        fresh = self._calls.fresh(work, ids[came], numbers[came], received, self.round)
        weights = None if weights is None else weights[came]
        count = not (second or cost.answers)
        return self._answered(fresh, started, ends.at[came], kept, fold, weights, cost, count)

    def check_possible(self, cost: Cost, within: float, **broadcast: Any) -> None:
        """Refuse to wait for less time than any client's job takes.

        Raises:
            ValueError: if no job of that cost is known to end within so many seconds.
        """
        fastest = least(self.job_times(cost, DRAWS, **broadcast), self.num_examples > 0)
        if fastest > within + TOLERANCE:
            raise ValueError(
                f"deadline={within:g} seconds is less than any client with data takes for a job, the fastest "
                f"{fastest:.4g}; raise it, or change clients.devices"
            )

    def exchange(
        self, replies: Replies, work: Work, *, graph: Graph | None = None, missing: int = 0, **broadcast: Any
    ) -> Replies:
        """Every client reads its neighbours' vectors (see `Fleet.exchange`); each sends a copy to each of them."""
        ids, n = replies.ids, len(replies)
        links, sent = everybody(n) if graph is None else graph.among(ids), dict(replies.fields)
        numbers = self.job_counts[ids] - 1  # the second half of the job whose reply is exchanged
        streams = Streams(self._seed, ids, numbers)
        arrive, heard = torch.ones(n, dtype=torch.bool), links
        if missing:
            heard = held_back(streams, heard, self.honest(ids), missing)
        if self.byzantine is not None:  # who may hold vectors back knows which
            arrive, sent, heard = self.byzantine.tell(ids, sent, heard, self.round)
        vector = FLOAT_BITS * sum(v[0].numel() for v in replies.fields.values() if v.ndim > 1)
        results = self._calls.run(self._calls.fresh(work, ids, numbers, broadcast, self.round, Inbox(sent, heard)))
        travels = arrive[links.peers] & ~links.is_own
        up, down = (vector * torch.bincount(who[travels], minlength=n) for who in (links.peers, links.hearers))
        self.ledger.bits_down += int(down.sum())
        self._observe(ids, arrive, results.metrics, up, count=False)
        seconds = self.timing.devices.seconds(streams, torch.zeros(n).double(), down.double(), up.double())
        finish = self.now + seconds
        self.now = max(self.now, float(finish.max()))
        return Replies(ids, self.num_examples[ids], finish, dict(results.fields), torch.zeros(n, dtype=torch.int64))

    def honest(self, ids: Tensor) -> Tensor:
        """[R] bool: which of these clients are honest."""
        return torch.ones(len(ids), dtype=torch.bool) if self.byzantine is None else self.byzantine.honest(ids)

    def job_times(self, cost: Cost, samples: int, messages: Tensor | None = None, **broadcast: Any) -> Times:
        """How long such a job takes (see `Fleet.job_times`); what must be drawn is, with keys that no real job has."""
        down = torch.zeros(len(self.clients), dtype=torch.int64)
        for value in broadcast.values():  # once clients have a copy: what `_book` will count
            if self.downlink is not None and self._compresses(value):
                down += self.downlink.bits(self._model_size, torch.ones_like(down) if messages is None else messages)
            else:
                down += bits_of(value)
        return self.timing.times(cost, samples, down)

    # The loop's side --------------------------------------------------------------------------------------------

    def evaluate(self, ids: Tensor, work: Work, **broadcast: Any) -> Mapping[str, Tensor]:
        """What clients say beside the rounds (see `DrivenFleet.evaluate`)."""
        jobs = self._calls.fresh(work, ids, self.job_counts[ids], broadcast, self.round)
        return self.executor.run(jobs).fields

    def end_round(self) -> Metrics:
        """See `Account`; jobs that died are counted wherever some may."""
        if self.absence.kills:
            self._observed += Metrics.count(num_dropped=0)
        return super().end_round()

    state_classes: ClassVar[dict[str, type]] = Account.state_classes | {
        cls.__qualname__: cls for cls in (Event, Knowledge, Results, Parts)
    }

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs: the account, the clock, memory, the jobs in flight, and replies that wait."""
        own = {"memory": self.memory.state(), "known": {} if self.byzantine is None else self.byzantine.known}
        return super().state() | {"now": self.now} | packed(self.queue) | own

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load(state)
        self.now, self.queue = state["now"], unpacked(state)
        self.memory.load(state["memory"])
        if self.byzantine is not None:
            self.byzantine.known = dict(state["known"])
        self._busy[:] = False
        self._busy[[e.client for e in self.queue]] = True

    # Inside -----------------------------------------------------------------------------------------------------

    def _reachable(self, ids: Tensor) -> Tensor | slice:
        """[R] bool, which of some clients are on line; for the others a job ends before it begins."""
        if not self.absence.away or not len(ids):
            return slice(None)
        on = self.absence.on_line(ids, self.now)
        self._observed += Metrics.count(num_dropped=int((~on).sum()))
        return on

    def _book(
        self, ids: Tensor, numbers: Tensor, cost: Cost, broadcast: Mapping[str, Any], second: bool = False
    ) -> tuple[Ends, dict[str, Any]]:
        """(how jobs [R], or their second halves, end, what clients get); counts what they download."""
        down, received = torch.zeros(len(ids), dtype=torch.int64), dict[str, Any]()
        for name, value in broadcast.items():
            if self.downlink is not None and len(ids) and self._compresses(value):
                received[name], bits, _ = self.downlink.send(name, value, ids, len(self.clients))
                down += bits
            elif isinstance(value, Held):
                received[name] = self._as_held(name, value)
            else:
                received[name] = value.decode()[0] if isinstance(value, Packet) else value
                down += bits_of(value)
        self.ledger.bits_down += int(down.sum())
        return self.timing.ends(ids, numbers, self.now, cost, down, second), received

    def _enqueue(self, ids: Tensor, numbers: Tensor, work: Work, ends: Ends, broadcast: Mapping[str, Any]) -> None:
        """Put jobs in flight."""
        start = self._sequence
        key = self._begin(ids, work, broadcast)
        rows = zip(ends.at.tolist(), ids.tolist(), numbers.tolist(), ends.lost.tolist(), strict=True)
        self.queue.push(Event(at, start + i, c, n, key, self.now, lost) for i, (at, c, n, lost) in enumerate(rows))

    def _next(self, work: str) -> float:
        """Seconds at which the next job of this work ends; now if none is in flight."""
        return min((e.finish for e in self.queue if self.sent[e.sent].work == work), default=self.now)

    def _kept(self, work: str, until: float) -> list[Event]:
        """Late jobs of earlier calls for this work that have ended with a reply by a time; those that died are over."""
        ended = self.queue.take(lambda e: e.finish <= until + TOLERANCE and self.sent[e.sent].work == work)
        self._bury([e for e in ended if e.lost >= 0])
        return [e for e in ended if e.lost < 0]

    def _bury(self, dead: list[Event]) -> None:
        """Take jobs off that died."""
        if dead:
            self._end((e.client, e.sent, e.started, e.finish) for e in dead)
            self._lose(torch.tensor([e.lost for e in dead]))

    def _lose(self, lost: Tensor) -> None:
        """Count jobs that died, and what they sent [R] of their replies."""
        self.ledger.bits_up += int(lost.sum())
        self._observed += Metrics.count(num_dropped=len(lost))

    def _answered(
        self,
        fresh: Jobs,
        started: float,
        finish: Tensor,
        kept: list[Event],
        fold: Fold | None,
        given: Tensor | None,
        cost: Cost,
        count: bool,
    ) -> Replies:
        """Replies to an `ask`, kept ones behind the fresh ones: computed, delivered, counted and folded."""
        calls, rows = [fresh], [(fresh.ids, finish, torch.zeros_like(fresh.ids), finish - started)]
        for key in sorted({e.sent for e in kept}):
            late = [e for e in kept if e.sent == key]
            calls.append(self._calls.of(late, self.sent, self.round))
            rows.append(self._end((e.client, key, e.started, e.finish) for e in late))
        ids, at, staleness, seconds = (torch.cat(parts) for parts in zip(*rows, strict=True))
        num_examples = self.num_examples[ids]
        attacked = self.byzantine is not None and not bool(self.byzantine.honest(ids).all())
        early = None if fold is None or attacked else weigh(fold, num_examples, given)
        results = self._calls.together(calls, early)
        fields: dict[str, Any] = {**results.fields, **results.sums}
        arrive = torch.ones(len(ids), dtype=torch.bool)
        if attacked and self.byzantine is not None and cost.vectors_up:
            arrive, fields = self.byzantine.deliver(ids, fields, self.round)
        bits = torch.zeros_like(results.bits_up) if cost.stays else results.bits_up
        self._observe(ids, arrive, results.metrics, bits, staleness if kept else None, count)
        if attacked and (fold is not None or not bool(arrive.any())):  # of no replies at all the sum is zero
            given = None if given is None else given[arrive]
            weights = torch.zeros(0) if fold is None else weigh(fold, num_examples[arrive], given)
            fields = {k: torch.tensordot(weights.to(v), v, dims=1) if v.ndim > 1 else v for k, v in fields.items()}
        each = (ids, num_examples, at, staleness, seconds)
        ids, num_examples, at, staleness, seconds = (values[arrive] for values in each)
        return Replies(ids, num_examples, at, fields, staleness, seconds, of_those(arrive, results.metrics))

    def _deliver(self, events: list[Event]) -> Replies:
        ids, finish, staleness, seconds = self._end((e.client, e.sent, e.started, e.finish) for e in events)
        results = Results.together([e.result for e in events if e.result is not None])
        self.memory.write(ids, results.memory)
        fields, arrive = dict(results.fields), torch.ones(len(ids), dtype=torch.bool)
        if self.byzantine is not None:
            arrive, fields = self.byzantine.deliver(ids, fields, self.round)
        self._observe(ids, arrive, results.metrics, results.bits_up, staleness)
        ids, finish, staleness = ids[arrive], finish[arrive], staleness[arrive]
        logged = of_those(arrive, results.metrics)
        return Replies(ids, self.num_examples[ids], finish, fields, staleness, seconds[arrive], logged)
