"""FedNova: changes are divided by how far a client's own steps go, so that nobody counts more for working more.

Wang, Liu, Liang, Joshi, Poor. Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization.
arXiv:2007.07481. Client i sends d_i = Delta_i / a_i, and the server steps along tau_eff times their mean. a_i is how
far gradients of one take K_i local steps, in units of the local step: K_i with plain SGD, the sum of c <- m * c + 1
with local momentum m, and a <- (1 - eta * mu) * a + 1 with a pull mu towards x. tau_eff is the mean of a_i, with a pull
that of K_i, as in the authors' code; behind a rule that is more than a mean it is their median, for a rule that cuts
long vectors means the length of d_i and not of a count.

Letters: P parameters; x the server's model, y a local one, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Mean, Median
from fedsim.clients.direction import GRADIENT, MODEL
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Exact, Fleet
from fedsim.strategies.momentum import shrunk
from fedsim.strategies.server import Rule, ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class FedNova(Synchronous):
    """FedAvg for clients that take different numbers of local steps, without favour to those that take many.

    Args:
        mu: strength of a pull of local models towards x, without local momentum.
        aggregator: how updates become one; the mean weighs clients by their samples unless told otherwise.
    """

    mu: float = 0.0
    aggregator: Rule = Mean()
    traits: ClassVar[Traits] = Traits(local_rules="momentum_sgd")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu is the strength of a pull and must be 0 or more, got {self.mu}")
        if self.mu and self.local.optimizer.momentum:
            raise ValueError(
                f"mu={self.mu} does not go with local momentum, for which no normaliser is known; set one of them to 0"
            )

    @property
    def cost(self) -> Cost:
        return replace(self.local.cost, scalars_up=1)

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x)
        tau_eff = float(r.mean("tau", rule if rule.foldable else Median()))
        return self.step(s, r.mean("d", rule), self.server_lr * tau_eff), {}

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        run = self.local(clients, x, GRADIENT + self.mu * (MODEL - x))
        work = zip(run.steps.tolist(), self.local.rates(clients), strict=True)
        a = torch.tensor([self.normaliser(steps, eta) for steps, eta in work], dtype=torch.float64).to(x.device)
        tau = run.steps if self.mu else a
        return {"d": shrunk(clients, run, torch.where(a > 0, a, 1.0)), "tau": Exact(tau[:, None].to(x))}

    def normaliser(self, steps: int, eta: float) -> float:
        """a_i: how far gradients of one take that many steps, in units of eta."""
        m, a, c = self.local.optimizer.momentum, 0.0, 0.0
        assert m is not None, "checked by `LocalTraining.check`"
        for _ in range(steps):
            c = m * c + 1
            a = (1 - eta * self.mu) * a + c
        return a
