"""pFedMe: gradient steps on the Moreau envelopes of the clients' losses.

Dinh, Tran, Nguyen. Personalized Federated Learning with Moreau Envelopes. arXiv:2006.08848, algorithm 1. A client's own
model theta nearly minimises f_i(theta) + lam / 2 |theta - w|^2 on a minibatch, by some steps from where it stood; then
lam * (w - theta) is the gradient of the envelope at its local w. The server takes (1 - beta) x + beta * mean of the
w_i: beta is server_lr. The mean counts every client once, as the paper's does. Written from memory of the algorithm;
tests derive its fixed point.

Letters: K local steps, P parameters; x the server's model, w a client's local one, theta its own; eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.kept import keep, recalled, x0
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.server import ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class PFedMe(Synchronous):
    """Personal models near the server's, which steps along the clients' Moreau envelopes.

    Args:
        lam: strength of the pull towards the local w; eta * lam should be less than 1.
        inner_steps: gradient steps of theta on every minibatch.
        inner_lr: their size.
    """

    lam: float = 15.0
    inner_steps: int = 5
    inner_lr: float = 0.01
    traits: ClassVar[Traits] = Traits(local_rules="plain_sgd", two_points=True, own_models=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1, got {self.inner_steps}")
        if not 0 < self.lam < inf:
            raise ValueError(f"lam pulls towards the local model and must be positive, got {self.lam}")
        if not 0 < self.inner_lr < inf:
            raise ValueError(f"inner_lr must be positive, got {self.inner_lr}")

    @property
    def cost(self) -> Cost:
        return Cost(steps=self._steps)

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x)
        return self.step(s, r.mean("delta", rule)), {}

    def _steps(self, num_examples: Tensor) -> Tensor:
        """[R]: gradients that clients take."""
        return self.inner_steps * self.local.schedule.num_steps(num_examples)

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        n, lr, lam = self.local.num_trainable, self.local.lr, self.lam
        w = x.repeat(len(clients), 1)
        theta, losses = w.clone(), torch.zeros(len(clients), device=x.device)
        batches = clients.task.batches(clients.ids, clients.streams, self.local.schedule)
        for step in range(len(batches)):
            k, batch = batches.active(step), batches[step]
            w_k, theta_k = w[:k, :n], theta[:k, :n]
            for _ in range(self.inner_steps):  # line 7: theta nearly solves the inner problem
                g, loss = clients.task.field(theta[:k], batch)
                theta_k -= self.inner_lr * (g[:, :n] + lam * (theta_k - w_k))
            w_k -= lr * lam * (w_k - theta_k)  # line 8
            losses[:k] += loss
        w[:, n:] = theta[:, n:]  # buffers follow the passes that were taken, which are theta's
        clients.log(train_loss=losses / batches.num_steps.clamp(min=1))
        keep(clients, "theta", theta)
        return {"delta": x - w}

    def personal_model(self, clients: Cohort, x: Tensor) -> Tensor:
        return recalled(clients, "theta", x0(clients))
