"""Servers: whom they ask, how they aggregate, and their step, the same for every strategy that has one.

With a server optimizer, FedAdam, FedYogi, FedAdagrad and FedAvgM (Reddi et al., arXiv:2003.00295; Hsu et al.,
arXiv:1909.06335) need no code of their own. They then have the core's form, bias-corrected where the rule is.

Letters: S clients in a round, R replies, P entries of a model; x the server's model, d the pseudo-gradient (received
minus local, aggregated).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, inf
from typing import Annotated, Any, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Aggregator, CenteredClipping, Mean, PreAggregator, prepared, started
from fedsim.clients.local_training import LocalTraining, Reply, apart
from fedsim.clients.oracle import full_loss
from fedsim.cohort import Cohort
from fedsim.config import FromTable
from fedsim.fleet import Cost, Fleet, Late, Replies, TooFewRows, Work, linear
from fedsim.optim import Optimizer, OptState
from fedsim.strategies.selection import Among, Known, Selection, Uniform
from fedsim.strategy import Combine, Strategy
from fedsim.streams import server_rng

Rule = Annotated[Aggregator, FromTable("aggregator", "mean")]
UniformRule = Annotated[Aggregator, FromTable("aggregator", {"name": "mean", "weights": "uniform"})]
UNIFORM = Mean(weights="uniform")
NO_ROUNDS = dict.fromkeys(
    ("over_select", "deadline", "late"),
    "it does not choose a cohort and wait for its replies, so that none can be late",
)
"""Why a strategy that is not synchronous has not these keys."""
EVERYBODY = ("cohort_size", "selection", "over_select")
"""Keys that a synchronous strategy has not which asks every client in every round."""


class Wait(TypedDict):
    """How long `Fleet.ask` waits."""

    within: float
    first: int | None
    late: Late


@dataclass(frozen=True)
class ServerState:
    """What a server keeps.

    Args:
        x: [P], the model to send and to evaluate.
        optimizer: the server optimizer's state, None without one.
        own: [P], where that optimizer stands if it averages weights or looks ahead; None where it stands at x.
        round: steps so far.
        last: [P], what the last step was taken along, where the aggregator begins there (centred clipping).
        known: what its selection remembers of the clients.
    """

    x: Tensor
    optimizer: OptState | None = None
    own: Tensor | None = None
    round: int = 0
    last: Tensor | None = None
    known: Mapping[str, Tensor] = field(default_factory=dict)


S = TypeVar("S", bound=ServerState)


@dataclass(frozen=True, kw_only=True)
class Aggregating(Strategy):
    """A strategy whose server makes one vector of many.

    Args:
        aggregator: how replies become one.
        pre_aggregators: what prepares the replies for it, one after the other.
    """

    aggregator: UniformRule = UNIFORM
    pre_aggregators: Annotated[tuple[PreAggregator, ...] | None, FromTable("pre_aggregators")] = None

    @property
    def folds(self) -> bool:
        """Whether replies are added up as they come."""
        return not self.pre_aggregators and self.aggregator.foldable

    def rule(self, rng: np.random.Generator, last: Tensor | None = None) -> Aggregator:
        """What to aggregate a round's replies by; it folds where it is linear, and may begin at its last result [P]."""
        return prepared(self.pre_aggregators, started(self.aggregator, last), rng)

    def combining(self) -> Combine:
        """Its rule; every row counts by itself, centred clipping starts at zero, and buckets are always the same."""
        return lambda rows, num_examples: self.rule(server_rng(0, "combining"))(rows, num_examples)


@dataclass(frozen=True, kw_only=True)
class Server(Aggregating):
    """A strategy whose clients train and whose server steps along the aggregate of their changes.

    Args:
        server_lr: the server's step along the pseudo-gradient.
        server_optimizer: a rule of the optimizer core for that step.
        local: local training.
    """

    server_lr: float = 1.0
    server_optimizer: Annotated[Optimizer | None, FromTable("server_optimizer")] = None
    local: LocalTraining

    def __post_init__(self) -> None:
        if not 0 < self.server_lr < inf:
            raise ValueError(f"server_lr must be positive, got {self.server_lr}")
        self.local.check(self.traits)

    def tuned(self, clients: Cohort, y: Tensor, epochs: int) -> Tensor:
        return y - self.local.aside(epochs)(apart(clients), y).delta.dense()

    def init(self, x0: Tensor, /) -> Any:
        return ServerState(x0, self.optimizer_state(x0))

    def optimizer_state(self, x0: Tensor) -> OptState | None:
        """The server optimizer's state before its first step."""
        rule = self.server_optimizer
        return None if rule is None else rule.init(x0[None, : rule.layout.size])

    def step(self, s: S, d: Tensor, lr: float | None = None, weight: float = 1.0) -> S:
        """The state after one step along d.

        Args:
            s: the state before.
            d: [P].
            lr: of the parameters; None is server_lr.
            weight: what the weights in d sum to; buffers move by at most a mean.
        """
        lr, rule, n, k = self.server_lr if lr is None else lr, self.server_optimizer, self.local.num_trainable, s.round
        s = replace(s, round=k + 1, last=d if isinstance(self.aggregator, CenteredClipping) else None)
        if rule is None or s.optimizer is None:
            return replace(s, x=step_along(s.x, d, lr, n, weight))
        before = s.x if s.own is None else s.own
        own, state = step_along(before, d, lr, n, weight), s.optimizer.gather([0])
        own[:n] = before[:n]
        factor = 1.0 if rule.schedule is None else rule.schedule.at_step(rounds=k, steps=k)
        rule.step_(own[None, :n], lr * d[None, :n], state, lr_scale=factor)
        final = rule.final(own[None, :n], state)[0]
        if final.data_ptr() == own.data_ptr():
            return replace(s, x=own, optimizer=state, own=None)
        return replace(s, x=torch.cat([final, own[n:]]), optimizer=state, own=own)


@dataclass(frozen=True, kw_only=True)
class Selecting(Server):
    """A server that chooses who takes part.

    Args:
        selection: the way to choose them.
    """

    selection: Annotated[Selection, FromTable("selection", "uniform")] = Uniform()

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self.selection).__name__
        if self.selection.weighs and not self.folds:
            raise ValueError(
                f"selection {name} gives every reply a weight of its own, and a rule that is not a mean counts each "
                "once; take the aggregator mean without pre_aggregators, or another selection"
            )
        if self.selection.weighs and not self.traits.bears_weights:
            raise ValueError(
                f"selection {name} gives every reply a weight of its own, and this strategy makes more of replies than "
                "their weighted sum; take another selection"
            )

    def wanted(self, num_clients: int) -> int:
        """Clients of N that are chosen at a time."""
        return self.at_work(num_clients)

    def known_at_first(self, num_clients: int) -> Known:
        """What the selection knows of N clients before the first round.

        Raises:
            ValueError: if there are too few clients, or its settings do not fit.
        """
        if (count := self.wanted(num_clients)) > num_clients:
            raise ValueError(
                f"strategy.cohort_size={count} exceeds the {num_clients} clients; lower it or raise clients.count"
            )
        return self.selection.start(num_clients, count)

    def among(self, s: ServerState, fleet: Fleet, clients: Tensor, count: int) -> Among:
        """What to choose a round's clients from: `count` of these [A], or all."""
        losses = partial(self.losses_at, fleet, s.x)
        return Among(clients, min(count, len(clients)), fleet.num_examples, s.round, losses)

    def choose(self, s: S, among: Among, rng: np.random.Generator) -> tuple[S, Tensor]:
        """(the state, with what the selection remembers of its choice; [S] clients, ascending)."""
        ids, known = self.selection.choose(s.known or self.known_at_first(len(among.num_examples)), among, rng)
        return replace(s, known=known), ids

    def noted(self, s: S, replies: Replies) -> S:
        """The state, with what the selection learns from replies to a round's work."""
        return replace(s, known=self.selection.noted(s.known, replies, s.round)) if len(replies) else s

    def losses_at(self, fleet: Fleet, x: Tensor, ids: Tensor) -> Tensor:
        """[d] float64 mean losses of clients at x [P], asked of them; minus infinity for one that does not answer.

        They have as long as a round's replies by themselves.
        """
        r = fleet.ask(ids.sort().values, self.local_loss, cost=self.query, within=self.within, x=x)
        losses = torch.full((len(fleet.clients),), -inf, dtype=torch.float64)
        if len(r):
            losses[r.ids] = r["loss"].to(losses)
        return losses[ids]

    @property
    def query(self) -> Cost:
        """Of asking for a loss: one number up; a pass forward counts as a third of a step."""
        return Cost(steps=lambda n: self.local.schedule.steps_per_epoch(n) / 3, vectors_up=0, scalars_up=1)

    @property
    def within(self) -> float:
        """Seconds for which replies are waited for at most."""
        return inf

    def local_loss(self, clients: Cohort, x: Tensor) -> Reply:
        return {"loss": full_loss(clients, x)}


@dataclass(frozen=True, kw_only=True)
class Synchronous(Selecting):
    """A server that asks a cohort and waits for it.

    Args:
        cohort_size: S; null means every client. Where fewer are on line and idle it is all that are.
        over_select: as many times S clients are asked, and the first S replies end the round.
        deadline: seconds after which a round ends with the replies that are there; null waits for all that come. What
            a selection asks before has as long by itself, and whoever does not answer by then comes last; of work in
            two messages the first has a deadline.
        late: what becomes of the others: drop, their clients stop and nobody computes what they would have sent; keep,
            they go on, and their replies are aggregated in the round in which they arrive, on top of its own.
    """

    cohort_size: int | None = None
    over_select: float = 1.0
    deadline: float | None = None
    late: Late = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cohort_size is not None and self.cohort_size < 1:
            raise ValueError(f"cohort_size must be at least 1, got {self.cohort_size}; null means every client")
        if not 1 <= self.over_select < inf or (self.over_select > 1 and self.cohort_size is None):
            raise ValueError(
                f"over_select must be a number of at least 1, and more than 1 needs a cohort_size; got "
                f"{self.over_select:g} with cohort_size {self.cohort_size or 'null'}"
            )
        if self.deadline is not None and not 0 < self.deadline < inf:
            raise ValueError(f"deadline must be positive seconds, or null for none, got {self.deadline}")
        if self.selection.weighs and (self.over_select > 1 or self.deadline is not None):
            raise ValueError(
                f"selection {type(self.selection).__name__} weighs replies by their chance to be drawn, which "
                "over_select and a deadline change by who is fast; leave these out, or take another selection"
            )
        if self.late == "keep":
            self._check_keep()

    def _check_keep(self) -> None:
        if self.deadline is None and self.over_select == 1:
            raise ValueError("late: keep needs a deadline or over_select, or no reply is ever late; set one of them")
        if self.traits.no_late is not None:
            raise ValueError(f"late: keep does not go with this strategy: {self.traits.no_late}; take late: drop")
        if self.local.optimizer.state_scope == "server":
            raise ValueError(
                "late: keep does not go with local.optimizer.state_scope: server, for a change of a state that is not "
                "the newest may make it what no optimizer can have; take late: drop, or state_scope round or client"
            )

    def at_work(self, num_clients: int) -> int:
        return num_clients if self.cohort_size is None else self.cohort_size

    def to_ask(self, num_clients: int) -> int:
        """How many clients of so many a round asks."""
        return min(num_clients, ceil(self.over_select * self.at_work(num_clients) - 1e-9))

    def ask(
        self,
        s: S,
        fleet: Fleet,
        rng: np.random.Generator,
        work: Work,
        /,
        *,
        rule: Aggregator,
        cost: Cost | None = None,
        **broadcast: Any,
    ) -> tuple[S, Replies]:
        """Choose a round's clients, give them work and wait for their replies.

        Args:
            s: the state, which knows what earlier rounds showed of the clients.
            fleet, rng: of the round.
            work: the client half.
            rule: what replies will be aggregated by; where it is linear they are folded as they come.
            cost: of the job; None is the strategy's.
            broadcast: what clients are sent.

        Returns:
            (the state, with what the replies show of the clients; replies, one at least).

        Raises:
            TooFewRows: if nobody replied; the selection remembers all the same whom it chose.
        """
        s, r = self.begin(s, fleet, rng, work, rule=rule, cost=self.cost if cost is None else cost, **broadcast)
        s = self.noted(s, r)
        return s, replace(r, in_vain=s)

    def begin(
        self,
        s: S,
        fleet: Fleet,
        rng: np.random.Generator,
        work: Work,
        /,
        *,
        rule: Aggregator,
        cost: Cost,
        **broadcast: Any,
    ) -> tuple[S, Replies]:
        """As `ask`, with the first half of clients' work: only the second one, in `go_on`, shows how they did."""
        fold = linear(rule)
        among = self.among(s, fleet, fleet.present(), self.to_ask(len(fleet.clients)))
        s, cohort = self.choose(s, among, rng)
        weights = self.selection.weights(fold, among, cohort)
        r = fleet.ask(cohort, work, cost=cost, fold=fold, weights=weights, **self.patience, **broadcast)
        if not len(r):
            raise TooFewRows("nobody replied", s)
        return s, replace(r, in_vain=s)

    def go_on(
        self, s: S, fleet: Fleet, begun: Replies, work: Work, /, *, rule: Aggregator, cost: Cost, **broadcast: Any
    ) -> tuple[S, Replies]:
        """Give those that replied to `begin` the second half of their work; all that come are waited for."""
        r = fleet.ask(begun.ids, work, cost=cost, fold=linear(rule), **broadcast)
        whole = begun.seconds[torch.isin(begun.ids, r.ids)] + r.seconds
        s = self.noted(s, replace(r, seconds=whole))
        return s, replace(r, in_vain=s)

    @property
    def cost(self) -> Cost:
        """Of the job that a round waits for, or of a shorter one."""
        return self.local.cost

    @property
    def costs(self) -> tuple[Cost, ...]:
        """Of everything that has a deadline: one that nobody can meet is refused before the run."""
        return (self.cost, self.query) if self.selection.asks else (self.cost,)

    @property
    def within(self) -> float:
        return inf if self.deadline is None else self.deadline

    @property
    def patience(self) -> Wait:
        """How long a round waits, as `fleet.ask` takes it."""
        return {"within": self.within, "first": self.cohort_size if self.over_select > 1 else None, "late": self.late}


def step_along(x: Tensor, d: Tensor, lr: float, num_trainable: int, weight: float = 1.0) -> Tensor:
    """x - lr * d, [P]; entries of buffers follow the clients' mean whatever the rate, or a variance could go below 0.

    Args:
        x, d: [P].
        lr: of the parameters.
        num_trainable: how many entries are parameters; buffers stand behind them.
        weight: what the weights in d sum to; buffers move by at most a mean.
    """
    out = lr * d
    torch.sub(x, out, out=out)
    out[num_trainable:] = x[num_trainable:] - d[num_trainable:] / max(weight, 1.0)
    return out
