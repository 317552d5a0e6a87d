"""FedDyn: every client's objective is corrected so that all of them have the solution of the whole as their own.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama. Federated Learning Based on Dynamic Regularization.
arXiv:2111.04263, algorithm 1, whose exact minimisers are local steps here: y goes down f_i(y) - <g_i, y> +
alpha / 2 |y - x|^2, and g_i becomes the gradient of f_i where it ends. From memory; checked by its limit, x* with
g_i = grad f_i(x*), and by h, which is the mean of the g_i of all N clients at all times (1/N, not 1/S).

Letters: N clients, S of them in a round, P parameters; x the server's model, y a local one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.direction import GRADIENT, MODEL
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.server import UNIFORM, ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """h: [P], the mean of all clients' g_i."""

    h: Tensor


@dataclass(frozen=True, kw_only=True)
class FedDyn(Synchronous):
    """Local steps on objectives that are corrected round by round.

    Args:
        alpha: strength of the pull towards x, and of the corrections; usually 0.01 to 0.1.
    """

    alpha: float = 0.1
    traits: ClassVar[Traits] = Traits(
        no_late="its step begins at the mean of the clients' models, and these must have begun at this round's",
        no_links="it needs whole vectors, since its h must stay the mean of what all clients keep",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha is the strength of a pull and must be positive, got {self.alpha}")
        if self.aggregator != UNIFORM or self.pre_aggregators:
            raise ValueError(
                "feddyn bears the uniform mean alone as aggregator, and no pre_aggregators: its h must stay the mean "
                "of what all clients keep; leave them out"
            )

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), h=torch.zeros_like(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule = self.rule(rng)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x)
        delta = r.mean("delta", rule)
        h = s.h + self.alpha * len(r) / len(fleet.clients) * delta
        h[self.local.num_trainable :] = 0  # buffers have no gradient
        return replace(self.step(s, delta + h / self.alpha), h=h), {}

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        g_i = clients.memory["g"]
        delta = self.local(clients, x, GRADIENT - g_i + self.alpha * (MODEL - x)).delta.dense()
        clients.memory["g"] = torch.add(g_i, delta, alpha=self.alpha)
        return {"delta": delta}
