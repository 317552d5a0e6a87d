"""SCAFFOLD: control variates correct the drift of local steps.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.
arXiv:1910.06378, algorithm 1. Option II is taken in the form that the paper shows it equals: c_i is the mean of the
K minibatch gradients used. c averages the c_i of all N clients at all times (1/N, not 1/S).

Letters: N clients, S of them in a round, K local steps, P parameters; x the server's model, y a local one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.direction import GRADIENT
from fedsim.clients.local_training import Reply
from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.control import followed, report
from fedsim.strategies.server import ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """c: [P], the mean of all clients' control variates."""

    c: Tensor


@dataclass(frozen=True, kw_only=True)
class Scaffold(Synchronous):
    """Local steps corrected by control variates.

    Args:
        option: how c_i is renewed: I, the full gradient at x; II, the mean of the minibatch gradients used.
    """

    option: Literal["I", "II"] = "II"
    traits: ClassVar[Traits] = Traits(local_rules="plain_sgd")

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), c=torch.zeros_like(x0))

    @property
    def cost(self) -> Cost:
        return replace(self.local.cost, vectors_up=2, exact_up=1)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x, c=s.c)
        s = self.step(s, r.mean("delta", rule))
        return replace(s, c=followed(s.c, r, self.rule(rng, s.c), len(fleet.clients))), {}

    def local_update(self, clients: Cohort, x: Tensor, c: Tensor) -> Reply:
        c_i = clients.memory["c"]
        local = self.local(clients, x, GRADIENT - c_i + c, mean_grad=self.option == "II")
        new = full_gradient(clients, x) if local.mean_grad is None else local.mean_grad
        clients.memory["c"] = new = local.where_stepped(new, c_i)
        return {"delta": local.delta, "c": report(self, new, c_i)}
