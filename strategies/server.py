"""The server's step along an aggregated pseudo-gradient, plain or by any rule of the shared optimizer core.

With a rule, FedAdam, FedYogi, FedAdagrad and FedAvgM (Reddi et al., arXiv:2003.00295; Hsu et al., arXiv:1909.06335)
need no code of their own. They then have the core's form: bias-corrected where the rule is, which FedAdam is not.

Letters: P entries of a model; x the server's model, d the pseudo-gradient (received minus local, averaged).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.optim import Optimizer, OptState


@dataclass(frozen=True)
class Server:
    """x <- x - lr * d, or one step of a rule on d.

    Args:
        x: [P].
        state: of the rule, or None.
    """

    x: Tensor
    state: OptState | None = None

    @classmethod
    def start(cls, x0: Tensor, optimizer: Optimizer | None) -> Server:
        """The server before its first step."""
        if optimizer is None:
            return cls(x0)
        return cls(x0, optimizer.init(x0[None, : optimizer.layout.size]))

    def step(self, d: Tensor, lr: float, num_trainable: int, optimizer: Optimizer | None, round: int) -> Server:
        """The server after one step; entries of buffers follow the clients' mean whatever the rule."""
        if optimizer is None or self.state is None:
            return Server(step_along(self.x, d, lr, num_trainable))
        n = optimizer.layout.size
        x, state = (self.x - d)[None], self.state.gather([0])
        x[:, :n] = self.x[:n]
        schedule = optimizer.schedule
        factor = 1.0 if schedule is None else schedule.at_step(rounds=round, steps=round)
        optimizer.step_(x[:, :n], lr * d[None, :n], state, lr_scale=factor)
        return Server(x[0], state)

    def point(self, optimizer: Optimizer | None) -> Tensor:
        """[P]: the model to send and to evaluate (weight averages and shifted rules keep another one inside)."""
        if optimizer is None or self.state is None:
            return self.x
        n = optimizer.layout.size
        final = optimizer.final(self.x[None, :n], self.state)[0]
        return torch.cat([final, self.x[n:]])


def step_along(x: Tensor, d: Tensor, lr: float, num_trainable: int, weight: float = 1.0) -> Tensor:
    """x - lr * d, [P]; entries of buffers follow the clients' mean whatever the rate, or a variance could go below 0.

    Args:
        x, d: [P].
        lr: of the parameters.
        num_trainable: how many entries are parameters; buffers stand behind them.
        weight: what the weights in d sum to; buffers move by at most a mean.
    """
    out = x - lr * d
    out[num_trainable:] = x[num_trainable:] - d[num_trainable:] / max(weight, 1.0)
    return out
