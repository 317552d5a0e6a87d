"""SCAFFOLD: control variates correct the drift of local steps.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.
arXiv:1910.06378, algorithm 1. Option II is taken in the form that the paper shows it equals: c_i is the mean of the
K minibatch gradients used. c averages the c_i of all N clients at all times (1/N, not 1/S).

Letters: N clients, S of them in a round, K local steps, P parameters; x the server's model, y a local one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.direction import GRADIENT
from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Exact, Fleet, choose
from fedsim.strategies.checks import check_cohort, check_plain_sgd
from fedsim.strategies.server import step_along
from fedsim.terms import Terms


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; c: [P], the mean of all clients' control variates."""

    x: Tensor
    c: Tensor


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """Local steps corrected by control variates.

    Args:
        cohort_size: S; null means every client.
        server_lr: eta_g, the server's step.
        option: how c_i is renewed: I, the full gradient at x; II, the mean of the minibatch gradients used.
        local: local training.
    """

    cohort_size: int | None = None
    server_lr: float = 1.0
    option: Literal["I", "II"] = "II"
    local: LocalTraining

    def __post_init__(self) -> None:
        check_cohort(self.cohort_size, self.server_lr)
        check_plain_sgd("scaffold", self.local)

    def init(self, x0: Tensor) -> State:
        return State(x0, torch.zeros_like(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        cohort = choose(fleet.clients, self.cohort_size, rng)
        cost = replace(self.local.cost, vectors_up=2, exact_up=1)
        r = fleet.ask(cohort, self.local_update, cost=cost, fold=Mean(weights="uniform"), x=s.x, c=s.c)
        x = step_along(s.x, r["delta"], self.server_lr, self.local.num_trainable)
        c = s.c + len(r) / len(fleet.clients) * r["dc"]
        return State(x, c), {}

    def local_update(self, clients: Cohort, x: Tensor, c: Tensor) -> Reply:
        c_i = clients.memory["c"]
        local = self.local(clients, x, GRADIENT - c_i + c, mean_grad=self.option == "II")
        new = full_gradient(clients, x) if local.mean_grad is None else local.mean_grad
        clients.memory["c"] = new = local.where_stepped(new, c_i)
        return {"delta": local.delta, "dc": Exact(Terms.of(new) - c_i)}
