"""The fleet over a Flower grid: the same calls as the simulator's, on the wall clock and real devices.

A client is known by its partition-id, so that cohorts, random numbers and the order of sums are those of a simulation;
replies are folded in the order in which the simulator folds stacks of one. Client memory stays with the clients. Peers
can't reach each other in Flower: the server relays what they exchange, and the ledger counts that.

Letters: N clients, R jobs or replies, M vectors sent to peers, P entries of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, ClassVar

import torch
from flwr.app import ConfigRecord
from torch import Tensor

from fedsim.compress.packet import Packet
from fedsim.fleet import Arrival, Cost, Fold, Replies, Work, weigh
from fedsim.flower import wire
from fedsim.flower.downlink import Copies
from fedsim.flower.mail import Flight, Landed, Letter, Mail
from fedsim.metrics import Metrics
from fedsim.sim.byzantine import who_hears
from fedsim.sim.executor import Gather, Results, cut, grouped
from fedsim.sim.fleet import ONE_STEP, TIMELINE, TOLERANCE, Ledger, Sent
from fedsim.sim.links import Copy, Downlink
from fedsim.streams import Streams

SERVER = -1  # the server's place among client ids, for random numbers behind its own packets


class FlowerFleet:
    """See the module's head.

    Args:
        mail: to and from the clients.
        seed: of the run.
        model_size: P, the size of vectors that the downlink compresses.
        downlink: compresses broadcasts; None sends them as they are.
    """

    def __init__(self, mail: Mail, *, seed: int, model_size: int, downlink: Downlink | None = None) -> None:
        self.mail = mail
        self.num_examples = mail.nodes.num_examples
        self.clients = torch.arange(len(self.num_examples))
        self.round = 0
        self.ledger = Ledger()
        self.job_counts = torch.zeros_like(self.num_examples)
        self._seed, self._model_size = seed, model_size
        self._copies = None if downlink is None else Copies(downlink)
        self.timeline: list[tuple[int, float, float, int]] = []
        self._calls = 0
        self._observed = Metrics()

    @property
    def now(self) -> float:
        """Seconds since the fleet was ready, those before a resume included."""
        return self.mail.now

    # The server half's side -------------------------------------------------------------------------------------

    def send(self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, **broadcast: Any) -> None:
        """Start work on idle clients.

        Raises:
            ValueError: if a client is still busy, unknown, or named twice.
        """
        if len(ids):
            self._dispatch(ids, work, self._number(ids), broadcast)

    def receive(self, *, until: float = inf, count: int | None = None) -> Replies:
        """Wait until a time, or for `count` replies, or (with neither) for all in flight; in order of arrival."""
        mail, last = self.mail, self.now
        while count is None or len(mail.landed) < count:
            last = self.now if mail.look() else last
            enough = count is not None and len(mail.landed) >= count
            if enough or self.now >= until - TOLERANCE or (until == inf and not mail.flights):
                break
            if until == inf:
                mail.check_patience(last)
            mail.clock.sleep(min(mail.patience.poll_seconds, max(until - self.now, 0.0)))
        due = list(mail.landed)[:count]
        return self._deliver([mail.landed.pop(client) for client in due])

    def ask(
        self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, fold: Fold | None = None, **broadcast: Any
    ) -> Replies:
        """Send to idle clients and wait for all of them; replies stand in the order of `ids`."""
        if fold is not None and not fold.foldable:
            raise ValueError(f"{type(fold).__name__} is not linear, so replies can't be folded; leave out fold=")
        self._dispatch(ids, work, self._number(ids), broadcast)
        return self._collect(ids, fold)

    def exchange(
        self, replies: Replies, work: Work, *, arrival: Arrival = "all", missing: int = 0, **broadcast: Any
    ) -> Replies:
        """Every client of `replies` is sent those of the others' vectors that reach it (see `Fleet.exchange`)."""
        ids, n = replies.ids, len(replies)
        numbers = self.job_counts[ids] - 1  # the second half of the job whose reply is exchanged
        lost = missing if arrival == "adversarial" else 0
        heard = who_hears(Streams(self._seed, ids, numbers), torch.arange(n), self.honest(ids), lost)
        inboxes = []
        for own in range(n):
            rows = torch.nonzero(heard[own]).flatten()
            vectors = {f"inbox/{k}": v[rows] for k, v in replies.fields.items()}
            inboxes.append((vectors, ConfigRecord({"rows": rows.tolist(), "total": n, "own": own})))
        self._dispatch(ids, work, numbers, broadcast, inboxes)
        return self._collect(ids, None, count=False)

    def honest(self, ids: Tensor) -> Tensor:
        """[R] bool: all of them, as far as anybody knows."""
        return torch.ones(len(ids), dtype=torch.bool)

    def job_seconds(self, cost: Cost, samples: int = 1, **broadcast: Any) -> Tensor:
        """[N, 1] float64: the mean of what jobs took so far, NaN for clients that have done none."""
        return (self.mail.took[0] / self.mail.took[1])[:, None]

    def job_law(self, cost: Cost, **broadcast: Any) -> tuple[Tensor, Tensor] | None:
        """([N], [N]) float64: the mean of what jobs took so far, and nothing on top."""
        mean = self.job_seconds(cost)[:, 0]
        return mean, torch.zeros_like(mean)

    # The loop's side --------------------------------------------------------------------------------------------

    def observations(self) -> Metrics:
        """What clients logged and how many replied since the last call."""
        seen, self._observed = self._observed, Metrics()
        return seen

    state_classes: ClassVar[dict[str, type]] = {"Flight": Flight, "Sent": Sent, "Ledger": Ledger, "Copy": Copy}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs. Jobs in flight are kept with their broadcasts, to be sent again."""
        return {
            "now": self.now,
            "ledger": self.ledger,
            "job_counts": self.job_counts,
            "versions": self.mail.versions,
            "took": self.mail.took,
            "calls": self._calls,
            "open": self.mail.open_jobs(),
            "sent": dict(self.mail.calls),
            "timeline": torch.tensor(self.timeline, dtype=torch.float64).view(-1, 4),
            "copies": {} if self._copies is None else self._copies.downlink.copies,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, and send open jobs again: to Flower a resumed run is a new one.

        Clients of a new run remember nothing; where a strategy needs what they remembered, they say so.
        """
        mail = self.mail
        mail.start = mail.clock.now() - state["now"]
        mail.versions, mail.took, mail.calls = state["versions"], state["took"], dict(state["sent"])
        self.ledger, self.job_counts, self._calls = state["ledger"], state["job_counts"], state["calls"]
        self.timeline = [(int(c), a, b, int(r)) for c, a, b, r in state["timeline"].tolist()]
        if self._copies is not None:
            self._copies.downlink.copies = dict(state["copies"])
            self._copies.forget()
        for flight in state["open"]:
            mail.post(flight.call, [Letter(flight.client, flight.number, mail.calls[flight.call].broadcast)])

    # Inside -----------------------------------------------------------------------------------------------------

    def _number(self, ids: Tensor) -> Tensor:
        """[R] numbers of new jobs, for clients that are idle."""
        n = len(self.clients)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= n):
            raise ValueError(f"client ids must lie in 0..{n - 1}, got {ids.min()}..{ids.max()}")
        if busy := {flight.client for flight in self.mail.open_jobs()}.intersection(ids.tolist()):
            raise ValueError(f"client {min(busy)} is still working; receive its reply before sending it more")
        if len(torch.unique(ids)) != len(ids):
            raise ValueError("a client was named twice in one call")
        self.job_counts[ids] += 1
        return self.job_counts[ids] - 1

    def _dispatch(
        self,
        ids: Tensor,
        work: Work,
        numbers: Tensor,
        broadcast: Mapping[str, Any],
        inboxes: Sequence[tuple[Mapping[str, Tensor], ConfigRecord]] = (),
    ) -> None:
        """Send one call's jobs, and count what clients download."""
        received, each, keys = self._encode(ids, broadcast)
        self.mail.calls[self._calls] = Sent(work.__name__, received, self.round)
        letters = [Letter(i, k, v) for i, k, v in zip(ids.tolist(), numbers.tolist(), each, strict=True)]
        if inboxes:
            pairs = zip(letters, inboxes, strict=True)
            letters = [Letter(m.client, m.number, {**m.values, **vectors}, inbox) for m, (vectors, inbox) in pairs]
        self.ledger.bits_down += self.mail.post(self._calls, letters, keys)
        self._calls += 1

    def _encode(
        self, ids: Tensor, broadcast: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]], list[wire.Key]]:
        """(what clients end up with, the values to send to each of them, keys of the packets among these)."""
        received: dict[str, Any] = {}
        each: list[dict[str, Any]] = [{} for _ in ids]
        keys: list[wire.Key] = [(self._seed, SERVER, self.round, 0)]
        for name, value in broadcast.items():
            if self._copies is not None and isinstance(value, Tensor) and value.numel() == self._model_size:
                received[name], parts, more = self._copies.send(name, value, ids, len(self.clients))
                keys += more
            else:
                received[name] = value.decode()[0] if isinstance(value, Packet) else value
                parts = [{name: value}] * len(ids)
            for values, part in zip(each, parts, strict=True):
                values |= part
        return received, each, keys

    def _collect(self, ids: Tensor, fold: Fold | None, count: bool = True) -> Replies:
        """All replies of one call, folded stack by stack as if each client were a stack of its own."""
        num_examples = self.num_examples[ids]
        weights = None if fold is None else weigh(fold, num_examples)
        gather = Gather(len(ids))
        arrived = torch.zeros(len(ids), dtype=torch.float64)
        for group in grouped(cut(num_examples, 1)):
            for index in group:
                landed = self.mail.take(int(ids[index]))
                arrived[index] = landed.at
                gather.add(index, landed.results if weights is None else _folded(landed.results, weights[index]))
            gather.end_group()
        self.mail.forget_calls()
        results, fresh = gather.results, torch.zeros(len(ids), dtype=torch.int64)
        self._observe(ids, results, None, count)
        return Replies(ids, num_examples, arrived, {**results.fields, **results.sums}, fresh)

    def _deliver(self, due: Sequence[Landed]) -> Replies:
        """Replies in order of arrival."""
        ids = torch.tensor([landed.flight.client for landed in due], dtype=torch.int64)
        rounds = torch.tensor([self.mail.calls[landed.flight.call].round for landed in due], dtype=torch.int64)
        at = torch.tensor([landed.at for landed in due], dtype=torch.float64)
        gather = Gather(len(due))
        for row, landed in enumerate(due):
            gather.add(torch.tensor([row]), landed.results)
            if len(self.timeline) < TIMELINE:
                self.timeline.append((landed.flight.client, landed.flight.started, landed.at, self.round + 1))
        self.mail.forget_calls()
        self._observe(ids, gather.results, self.round - rounds)
        return Replies(ids, self.num_examples[ids], at, dict(gather.results.fields), self.round - rounds)

    def _observe(self, ids: Tensor, results: Results, staleness: Tensor | None, count: bool = True) -> None:
        """Note what replies cost and say."""
        self.ledger.bits_up += int(results.bits_up.sum())
        seen = Metrics.count(num_clients=len(ids) if count else 0)
        for name, values in results.metrics.items():
            seen += Metrics.mean_over(values, self.num_examples[ids], name=name)
        if staleness is not None and len(ids):
            seen += Metrics.mean_over(staleness, torch.ones(len(ids)), name="staleness_mean")
        self._observed += seen


def _folded(results: Results, weight: Tensor) -> Results:
    """One client's results, its vectors multiplied by its weight [1]."""
    vectors = {k: v for k, v in results.fields.items() if v.ndim > 1}
    rest = {k: v for k, v in results.fields.items() if v.ndim <= 1}
    sums = {k: torch.tensordot(weight.to(v), v, dims=1) for k, v in vectors.items()}
    return Results(rest, sums, results.memory, results.metrics, results.bits_up)
