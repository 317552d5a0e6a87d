"""Local runs along a recursive estimate of the gradient (STORM), which every step renews on one minibatch.

Letters: C clients of a stack, k of them still stepping, P entries, n of them trainable; y the local model, d the
estimate that a step follows, a the weight of the fresh gradient in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.task import Schedule


def recursive_run(
    cohort: Cohort, x: Tensor, d: Tensor, schedule: Schedule, lr: float, a: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps y <- y - lr * d, after each of which d <- g(y) + (1 - a) * (d - g(y before the step)).

    Args:
        cohort: the clients.
        x: [P], where they start.
        d: [P], the estimate that they start with.
        schedule: how many steps, on which minibatches.
        lr: of the steps.
        a: 1 forgets the estimate, 0 never refreshes it.

    Returns:
        (y [C, P], d [C, P], sum of each client's losses [C], its steps [C]); y and d are scratch.
    """
    n, task = cohort.task.layout.num_trainable, cohort.task
    batches = task.batches(cohort.ids, cohort.streams, schedule)
    y, before = cohort.scratch("y", x).copy_(x), cohort.scratch("other", x)
    own, fresh, old = (cohort.scratch(name, x) for name in ("estimate", "gradient", "other_gradient"))
    own.copy_(d)
    losses = torch.zeros(len(cohort), device=y.device)
    active, sessions = -1, None
    for step in range(len(batches)):
        k, batch = batches.active(step), batches[step]
        if k != active:
            active, sessions = k, (task.session(y[:k]), task.session(before[:k]))
        assert sessions is not None
        before[:k] = y[:k]
        y[:k, :n].sub_(own[:k, :n], alpha=lr)
        g, loss = sessions[0].gradient(batch, fresh[:k])
        there, _ = sessions[1].gradient(batch, old[:k])
        own[:k].sub_(there).mul_(1 - a).add_(g)
        losses[:k] += loss.to(losses.dtype)
    return y, own, losses, batches.num_steps
