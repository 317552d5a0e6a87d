"""What asynchronous schemes share: a server that steps along a weighted sum of changes, and clients' weights d_i.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189.

Letters: N clients, R replies of an aggregation, P parameters; d_i the weight of a contribution, p_i a client's
importance, tau_i its job's time, v_i its change.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Aggregator, Fleet, Replies
from fedsim.strategies.clocks import Durations, Importance, Times, able, given_jobs, importances, known_jobs
from fedsim.strategies.server import NO_ROUNDS, UNIFORM, S, Server, ServerState
from fedsim.strategy import Traits

Weights = Literal["unbiased", "observed", "identical"]
ALL_WORK = "in this scheme every client with data is at work at all times; lower clients.count for fewer"
NO_COHORT = dict.fromkeys(("cohort_size", "selection"), ALL_WORK) | NO_ROUNDS
"""Why a scheme that sends at once has not these keys of a server."""


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """What the next aggregation needs, known from the first round on.

    Args:
        idle: [I] clients whose replies came last, in their order.
        d: [N] weights; p_i where they are observed.
        arrivals: [N] how many aggregations contained each client, where weights are observed.
    """

    idle: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    d: Tensor = field(default_factory=lambda: torch.zeros(0))
    arrivals: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class Asynchronous(Server):
    """A server that aggregates what has arrived while others are still at work."""

    traits: ClassVar[Traits] = Traits(refused=NO_COHORT)
    waits_for: ClassVar[int] = 1
    """Clients that a step can't do without where nobody is at work."""

    def check_fleet(self, fleet: Fleet, x: Tensor) -> None:
        able(fleet)

    def free(self, s: State, fleet: Fleet) -> Tensor:
        """[I] clients to be sent work: all that are idle and on line and have data.

        Those that replied last come first, in the order of their replies: where jobs end at the same time, replies
        arrive in the order in which the jobs were sent.
        """
        there = fleet.present(self.waits_for, with_data=True)
        if len(there) > 1:
            again = s.idle[torch.isin(s.idle, there)]
            there = torch.cat([again, there[~torch.isin(there, again)]])
        return there

    def absorb(self, s: S, r: Replies, d: Tensor, rule: Aggregator) -> S:
        """The state after one step along the sum of d_i v_i, d [R]; where nothing arrived, nothing moves."""
        if not len(r):
            return replace(s, round=s.round + 1)
        if rule == UNIFORM:
            delta = r.weighted("delta", d, like=s.x)
        else:
            delta = aggregated(r["delta"] * d.to(r["delta"])[:, None], r.num_examples, rule)
        return self.step(s, delta, weight=float(d.sum()))

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        return {"delta": self.local(clients, x).delta}


@dataclass(frozen=True, kw_only=True)
class Weighted(Asynchronous):
    """A scheme whose weights d_i may follow from how long clients' jobs take.

    Args:
        weights: unbiased, so that in the long run every client moves the model by its importance; observed, the same
            where nobody knows clocks, by the share of aggregations so far that contained a client (this one among
            them, so that a first arrival in the n-th weighs n p_i, what it missed included); or identical. Unbiased
            ones follow from the clocks alone, and reckon with nobody who is away or drops out.
        importance: p_i, by samples or uniform.
        job_seconds: tau_i, where the fleet can't know; one number a client.
    """

    weights: Weights = "unbiased"
    importance: Importance = "uniform"
    job_seconds: tuple[float, ...] | None = None

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0))

    def check_fleet(self, fleet: Fleet, x: Tensor) -> None:
        super().check_fleet(fleet, x)
        if self.job_seconds is not None:
            given_jobs(self.job_seconds, importances(self.importance, fleet.num_examples))

    def begun(self, s: State, fleet: Fleet) -> State:
        """The state with weights, at first."""
        if s.round:
            return s
        return replace(s, d=self.client_weights(fleet, s.x), arrivals=torch.zeros_like(fleet.clients))

    def noted(self, s: State, r: Replies) -> tuple[State, Tensor]:
        """(the state that knows who arrived and is idle, their weights d [R])."""
        s = replace(s, idle=r.ids)
        if self.weights != "observed":
            return s, s.d[r.ids]
        arrivals = s.arrivals.clone()
        arrivals[r.ids] += 1
        return replace(s, arrivals=arrivals), s.d[r.ids] * (s.round + 1) / arrivals[r.ids]

    def client_weights(self, fleet: Fleet, x: Tensor) -> Tensor:
        """d [N] for jobs that download x."""
        able(fleet)
        p = importances(self.importance, fleet.num_examples)
        if self.weights == "identical":
            return self.identical(p)
        if self.weights == "observed":
            return p
        if self.job_seconds is None:
            jobs = known_jobs(fleet, self.local.cost, x)
        else:
            jobs = given_jobs(self.job_seconds, p)
        if not jobs.vary:
            return self.unbiased(p, jobs.one)
        clients = able(fleet)
        return p.scatter(0, clients, p[clients] / self.shares(jobs.seconds(clients)))

    @abstractmethod
    def identical(self, p: Tensor) -> Tensor:
        """d [N] that looks at no clock."""

    @abstractmethod
    def unbiased(self, p: Tensor, times: Times) -> Tensor:
        """d [N]: p_i over the share of aggregations that contain i."""

    @abstractmethod
    def shares(self, seconds: Durations) -> Tensor:
        """[W] share of aggregations that contain each client with data, on the schedule of these jobs."""


def aggregated(rows: Tensor, num_examples: Tensor, rule: Aggregator) -> Tensor:
    """[P] from the rows d_i v_i [R, P] by a rule that is more than their sum.

    It gets R d_i v_i, each counted once: the mean of these is the sum of d_i v_i, so that by the uniform mean every
    scheme is what its paper says.

    >>> aggregated(torch.tensor([[0.5], [0.25]]), torch.ones(2), UNIFORM)
    tensor([0.7500])
    """
    return rule(len(rows) * rows, num_examples)
