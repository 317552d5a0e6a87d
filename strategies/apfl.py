"""APFL: every client mixes the model that it received with one of its own.

Deng, Kamani, Mahdavi. Adaptive Personalized Federated Learning. arXiv:2003.13461, algorithm 1, from memory. A client
steps w, the model that it received, as in FedAvg, and v, its own, along alpha * grad f_i(alpha v + (1 - alpha) w), the
gradient of the mixture's loss by v, both on one minibatch. alpha = 0 is FedAvg, alpha = 1 local training alone (tests).
An adaptive alpha takes one step a round, at the first minibatch and with the step size eta, along the mixture's
gradient by alpha, <v - w, grad f_i(alpha v + (1 - alpha) w)>, and stays in [0, 1].

Letters: C clients of a stack, P parameters; x the server's model, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.kept import keep, recalled, x0
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.momentum import twice
from fedsim.strategies.server import Rule, ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class APFL(Synchronous):
    """A mixture of the server's model and one of the client's own, trained as such.

    Args:
        alpha: the share of a client's own model, in [0, 1]; of an adaptive one the first.
        adaptive: whether every client learns its own alpha.
        aggregator: how updates become one; the mean weighs clients by their samples unless told otherwise, while the
            paper's counts every client once.
    """

    alpha: float = 0.5
    adaptive: bool = False
    aggregator: Rule = Mean()
    traits: ClassVar[Traits] = Traits(local_rules="plain_sgd", two_points=True, own_models=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share and must lie in [0, 1], got {self.alpha}")

    @property
    def cost(self) -> Cost:
        return twice(self.local)

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x)
        return self.step(s, r.mean("delta", rule)), {}

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        n, lr = self.local.num_trainable, self.local.lr
        w, v, alpha = x.repeat(len(clients), 1), self._own(clients), self._alpha(clients)
        losses = torch.zeros(len(clients), device=x.device)
        batches = clients.task.batches(clients.ids, clients.streams, self.local.schedule)
        for step in range(len(batches)):
            k, batch = batches.active(step), batches[step]
            mixed, share = self._mixed(v[:k], w[:k], alpha[:k]), alpha[:k].clone()
            g, _ = clients.task.field(mixed, batch)  # used up before the next one is taken: it may lie in a pool
            if self.adaptive and step == 0:
                along = ((v[:k, :n] - w[:k, :n]) * g[:, :n]).sum(1, keepdim=True)
                alpha[:k] = (share - lr * along).clamp(0, 1)
            v[:k, :n] -= lr * share * g[:, :n]
            v[:k, n:] = mixed[:, n:]
            g, loss = clients.task.field(w[:k], batch)
            w[:k, :n] -= lr * g[:, :n]
            losses[:k] += loss
        clients.log(train_loss=losses / batches.num_steps.clamp(min=1), alpha=alpha[:, 0].float())
        keep(clients, "v", v)
        if self.adaptive:
            keep(clients, "alpha", alpha)
        return {"delta": x - w}

    def personal_model(self, clients: Cohort, x: Tensor) -> Tensor:
        return self._mixed(self._own(clients), x, self._alpha(clients))

    def _own(self, clients: Cohort) -> Tensor:
        """[C, P]: v."""
        return recalled(clients, "v", x0(clients))

    def _alpha(self, clients: Cohort) -> Tensor:
        """[C, 1]."""
        start = x0(clients).new_full((1,), self.alpha)
        return recalled(clients, "alpha", start)

    def _mixed(self, v: Tensor, w: Tensor, alpha: Tensor) -> Tensor:
        """[C, P]: alpha v + (1 - alpha) w; buffers are a client's own."""
        n = self.local.num_trainable
        out = alpha * v + (1 - alpha) * w
        out[:, n:] = v[:, n:]
        return out
