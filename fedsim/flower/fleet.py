"""The fleet over a Flower grid: the same calls as the simulator's, on the wall clock and real devices.

A client is known by its partition-id, so that cohorts, random numbers and the order of sums are those of a simulation;
replies are folded in the order in which the simulator folds stacks of one. Client memory stays with the clients. Peers
can't reach each other in Flower: the server relays what they exchange, and the ledger counts that.

Letters: N clients, R jobs or replies, M vectors sent to peers, P entries of a vector.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.compress.packet import Packet
from fedsim.fleet import Cost, Fold, Held, Late, Replies, Times, Work, weigh
from fedsim.flower import wire
from fedsim.flower.downlink import Copies
from fedsim.flower.mail import Ended, Flight, How, Landed, Letter, Mail
from fedsim.graph import Graph, Inbox, everybody
from fedsim.metrics import Metrics
from fedsim.sim.account import Account, check_foldable, is_second_half
from fedsim.sim.byzantine import held_back
from fedsim.sim.events import Sent
from fedsim.sim.executor import ClientError, Results, cut, grouped
from fedsim.sim.fleet import ONE_STEP
from fedsim.sim.gather import Gather
from fedsim.sim.links import Downlink
from fedsim.stop import Diverged
from fedsim.streams import Streams

ANYTHING = Cost(vectors_up=0)  # of a reply of which no cost says what it holds
COUNTED: dict[How, str] = {
    "dropped": "num_dropped",
    "failed": "num_failed",
    "refused": "num_refused",
    "diverged": "num_refused",
}
SERVER = -1  # the server's place among client ids, for random numbers behind its own packets


class FlowerFleet(Account):
    """See the module's head.

    Args:
        mail: to and from the clients.
        seed: of the run.
        model_size: P, the size of vectors that the downlink compresses.
        downlink: compresses broadcasts; None sends them as they are.
        needs_all: why the strategy cannot do without a reply (`Traits`); None where it can.
    """

    def __init__(
        self,
        mail: Mail,
        *,
        seed: int,
        model_size: int,
        downlink: Downlink | None = None,
        needs_all: str | None = None,
    ) -> None:
        super().__init__(mail.nodes.num_examples, model_size, seed, downlink)
        self.mail, self._needs_all = mail, needs_all
        mail.needs_all = needs_all is not None
        self._copies = None if downlink is None else Copies(downlink)

    @property
    def now(self) -> float:
        """Seconds since the fleet was ready, those before a resume included."""
        return self.mail.now

    @property
    def num_at_work(self) -> int:
        """Jobs in flight."""
        return len(self.mail.flights) + len(self.mail.landed)

    def devices(self) -> Mapping[str, Tensor]:
        """{what: [N]} of each client's device."""
        return self.mail.devices.columns()

    # The server half's side -------------------------------------------------------------------------------------

    def present(self, at_least: int = 1, with_data: bool = False) -> Tensor:
        """[A] clients that are connected and idle, in ascending order (see `Fleet.present`).

        Raises:
            ClientError: if too few are connected when patience is over.
        """
        ids = super().present(at_least, with_data)
        wanted = 0 if self.num_at_work else at_least
        return ids[torch.tensor(self.mail.connected(ids.tolist(), wanted), dtype=torch.bool)]

    def send(self, ids: Tensor, work: Work, *, cost: Cost = ONE_STEP, **broadcast: Any) -> None:
        """Start work on idle clients.

        Raises:
            ValueError: if a client is still busy, unknown, or named twice.
        """
        if len(ids):
            self._dispatch(ids, work, self._number(ids), broadcast, cost=cost)

    def receive(self, *, until: float = inf, count: int | None = None) -> Replies:
        """Wait until a time, or for `count` replies, or (with neither) for all in flight; in order of arrival."""
        mail = self.mail

        def enough() -> bool:
            return (count is not None and len(mail.landed) >= count) or (until == inf and not mail.flights)

        mail.wait(enough, until)
        self._bury()
        due = list(mail.landed)[:count]
        return self._deliver([mail.landed.pop(client) for client in due])

    def cancel(self, ids: Tensor) -> None:
        """Call off jobs in flight (see `Fleet.cancel`); what a device still answers is left where it lies."""
        mail, clients = self.mail, ids.tolist()
        landed = [mail.landed.pop(c).flight for c in clients if c in mail.landed]
        self._end((f.client, f.key, f.started, self.now) for f in [*mail.forget(clients), *landed])

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
        """Send to idle clients and wait for them; replies stand in the order of `ids` (see `Fleet.ask`)."""
        check_foldable(fold)
        second = is_second_half(broadcast)
        self._dispatch(ids, work, self._number(ids, second), broadcast, cost=cost)
        there, came = self._in_time(ids, work, within, first, late, cost)
        counts = not (second or cost.answers)
        return self._collect(there, fold, None if weights is None else weights[came], count=counts)

    def exchange(
        self, replies: Replies, work: Work, *, graph: Graph | None = None, missing: int = 0, **broadcast: Any
    ) -> Replies:
        """Every client of `replies` is sent those of the others' vectors that reach it (see `Fleet.exchange`)."""
        ids = replies.ids
        numbers = self.job_counts[ids] - 1  # the second half of the job whose reply is exchanged
        heard = everybody(len(ids)) if graph is None else graph.among(ids)
        if missing:
            heard = held_back(Streams(self._seed, ids, numbers), heard, self.honest(ids), missing)
        self._dispatch(ids, work, numbers, broadcast, Inbox(replies.fields, heard), ANYTHING)
        return self._collect(self._in_time(ids, work, inf, None, "drop")[0], None, count=False)

    def job_times(self, cost: Cost, samples: int, messages: Tensor | None = None, **broadcast: Any) -> Times:
        """The mean of what jobs took so far, NaN for clients that have done none."""
        mean = self.mail.devices.mean_seconds
        return Times(mean, torch.zeros_like(mean))

    # The loop's side --------------------------------------------------------------------------------------------

    def evaluate(self, ids: Tensor, work: Work, **broadcast: Any) -> Mapping[str, Tensor]:
        """What clients say beside the rounds (see `DrivenFleet.evaluate`), in messages that train nobody.

        NaN stands for whoever is not there or does not answer in time; a warning says who that is.
        """
        letters = [Letter(int(i), int(self.job_counts[i]), broadcast) for i in ids]
        said = self.mail.aside(Sent(work.__name__, broadcast, self.round), letters)
        if missing := [letter.client for letter in letters if letter.client not in said]:
            warnings.warn(f"{work.__name__} goes on without client(s) {', '.join(map(str, missing))}", stacklevel=2)
        some = next(iter(said.values()), {})
        nothing = {name: torch.full_like(value.double(), nan) for name, value in some.items()}
        rows = [said.get(letter.client, nothing) for letter in letters]
        return {
            name: torch.cat([row[name].to(nothing[name]) if missing else row[name] for row in rows]) for name in some
        }

    state_classes: ClassVar[dict[str, type]] = {**Account.state_classes, "Flight": Flight}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs. Jobs in flight are kept with their broadcasts, to be sent again."""
        return super().state() | {
            "now": self.now,
            "versions": self.mail.save(),
            "run": self.mail.run,
            "devices": self.mail.devices.state(),
            "open": self.mail.open_jobs(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, and send open jobs again: to Flower a resumed run is a new one.

        Clients without a folder for it remember nothing in a new run; where they need it, they say so.
        """
        super().load(state)
        mail = self.mail
        mail.start = mail.clock.now() - state["now"]
        mail.run = state["run"]
        mail.versions, mail.saved = state["versions"].clone(), state["versions"]
        mail.devices.load(state["devices"])
        if self._copies is not None:
            self._copies.forget()
        self._busy[:] = False
        for flight in state["open"]:
            self._busy[flight.client] = True
            sent = self.sent[flight.key]
            letter = Letter(flight.client, flight.number, sent.broadcast)
            mail.post(sent, flight.key, [letter], vectors=flight.vectors)

    # Inside -----------------------------------------------------------------------------------------------------

    def _dispatch(
        self,
        ids: Tensor,
        work: Work,
        numbers: Tensor,
        broadcast: Mapping[str, Any],
        inbox: Inbox | None = None,
        cost: Cost = ONE_STEP,
    ) -> None:
        """Send one call's jobs, and count what clients download."""
        received, each, keys = self._encode(ids, broadcast)
        key = self._begin(ids, work, received)
        boxes = [inbox and inbox.rows(torch.tensor([row])) for row in range(len(ids))]
        letters = [Letter(*to) for to in zip(ids.tolist(), numbers.tolist(), each, boxes, strict=True)]
        vectors = cost.vectors_up if cost.bits_up is None else 0
        self.ledger.bits_down += self.mail.post(self.sent[key], key, letters, keys, vectors)

    def _encode(
        self, ids: Tensor, broadcast: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]], list[wire.Key]]:
        """(what clients end up with, the values to send to each of them, keys of the packets among these)."""
        received: dict[str, Any] = {}
        each: list[dict[str, Any]] = [{} for _ in ids]
        keys: list[wire.Key] = [(self._seed, SERVER, self.round, 0)]
        for name, value in broadcast.items():
            if self._copies is not None and len(ids) and self._compresses(value):
                received[name], parts, more = self._copies.send(name, value, ids, len(self.clients))
                keys += more
            elif isinstance(value, Held):
                received[name] = self._as_held(name, value)
                parts = [{name: received[name]}] * len(ids)
            else:
                received[name] = value.decode()[0] if isinstance(value, Packet) else value
                parts = [{name: value}] * len(ids)
            for values, part in zip(each, parts, strict=True):
                values |= part
        return received, each, keys

    def _in_time(
        self, ids: Tensor, work: Work, within: float, first: int | None, late: Late, cost: Cost = ONE_STEP
    ) -> tuple[Tensor, Tensor]:
        """(clients whose replies are there when a call's time is over, kept ones of earlier calls last; [R] bool).

        A client that is told to stop goes on all the same, for Flower has no word for that; nobody reads its reply, and
        what it wrote to its memory it forgets when it is sent its next job.
        """
        mail, clients, name = self.mail, ids.tolist(), work.__name__

        def kept() -> list[int]:
            return [c for c, r in mail.landed.items() if c not in clients and self.sent[r.flight.key].work == name]

        def enough() -> bool:
            ended = sum(e.flight.client in clients for e in mail.ended)
            missing = sum(c not in mail.landed for c in clients) - ended
            if not clients:
                return bool(kept()) or not mail.flights
            return missing <= 0 or (first is not None and sum(c in mail.landed for c in clients) >= first)

        mail.wait(enough, self.now + within)
        self._bury()
        came = torch.tensor([c in mail.landed for c in clients], dtype=torch.bool)
        if not cost.answers and (within < inf or first is not None):
            flying = {flight.client for flight, _ in mail.flights.values()}
            self._observed += Metrics.count(num_late=len(flying.intersection(clients)))
        if late == "drop":
            self._end((f.client, f.key, f.started, self.now) for f in mail.forget(clients))
        return torch.cat([ids[came], torch.tensor(kept(), dtype=torch.int64)]), came

    def _bury(self) -> None:
        """Take off the jobs that ended without a reply; what their nodes know of broadcasts is not known.

        Raises:
            ClientError: if the strategy needs every reply, or all clients that were waited for failed.
            Diverged: if what all of them sent is not finite.
        """
        mail = self.mail
        ended, mail.ended = mail.ended, []
        if not ended:
            return
        self._end((e.flight.client, e.flight.key, e.flight.started, self.now) for e in ended)
        self._observed += Metrics.count(**Counter(COUNTED[e.how] for e in ended))
        for copy in () if self.downlink is None else self.downlink.copies.values():
            copy.seen[[e.flight.client for e in ended if e.how in ("dropped", "failed")]] = 0
        if not mail.landed and not mail.flights:
            self._check_some(ended)
        if self._needs_all is not None:
            raise ClientError(f"{ended[0].what}; the run can't go on without: {self._needs_all}")

    def _check_some(self, ended: Sequence[Ended]) -> None:
        """Refuse to go on where nobody's job ended with a reply, and that is no fault of the network."""
        if all(e.how == "diverged" for e in ended):
            raise Diverged(self.round + 1, "what every client sent")
        if all(e.how == "failed" for e in ended):
            raise ClientError("every client failed: " + "; ".join(e.what for e in ended))

    def _collect(self, ids: Tensor, fold: Fold | None, given: Tensor | None = None, count: bool = True) -> Replies:
        """All replies of one call, folded stack by stack as if each client were a stack of its own."""
        num_examples = self.num_examples[ids]
        weights = None if fold is None else weigh(fold, num_examples, given)
        groups = grouped(cut(num_examples, 1))
        gather = Gather(len(ids), num_groups=len(groups))
        landed: list[Landed | None] = [None] * len(ids)
        for group in groups:
            for index in group:
                landed[int(index)] = reply = self.mail.landed.pop(int(ids[index]))
                gather.add(index, reply.results if weights is None else _folded(reply.results, weights[index]))
            gather.end_group()
        _, arrived, staleness, seconds = self._close([reply for reply in landed if reply is not None])
        results, all_of = gather.results, torch.ones_like(ids, dtype=torch.bool)
        missed = staleness if bool(staleness.any()) else None
        self._observe(ids, all_of, results.metrics, results.bits_up, missed, count)
        fields = {**results.fields, **results.sums}
        return Replies(ids, num_examples, arrived, fields, staleness, seconds, dict(results.metrics))

    def _deliver(self, due: Sequence[Landed]) -> Replies:
        """Replies in order of arrival."""
        ids, at, staleness, seconds = self._close(due)
        gather = Gather(len(due))
        for row, landed in enumerate(due):
            gather.add(torch.tensor([row]), landed.results)
        results = gather.results
        self._observe(ids, torch.ones_like(ids, dtype=torch.bool), results.metrics, results.bits_up, staleness)
        fields, logged = dict(results.fields), dict(results.metrics)
        return Replies(ids, self.num_examples[ids], at, fields, staleness, seconds, logged)

    def _close(self, due: Sequence[Landed]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        for d in due:
            self.mail.devices.replied(d.flight.client, d.at - d.flight.started, d.results.metrics)
        return self._end((d.flight.client, d.flight.key, d.flight.started, d.at) for d in due)


def _folded(results: Results, weight: Tensor) -> Results:
    """One client's results, its vectors multiplied by its weight [1]."""
    vectors = {k: v for k, v in results.fields.items() if v.ndim > 1}
    rest = {k: v for k, v in results.fields.items() if v.ndim <= 1}
    sums = {k: torch.tensordot(weight.to(v), v, dims=1) for k, v in vectors.items()}
    return Results(rest, sums, results.memory, results.metrics, results.bits_up)
