"""What clients will do in a round, asked of the strategy that will run, and the plan in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.clients.local_training import LocalTraining
from fedsim.engine import Plan
from fedsim.params import Layout
from fedsim.strategy import Strategy, parts


@dataclass(frozen=True)
class Work:
    """What engine and stack width are chosen for.

    Args:
        cohort_size: clients of a round.
        steps: [N] local steps of each client.
        batch_size: samples of a step at most.
        in_factors: whether local training can keep its steps in factors, on models that have them.
    """

    cohort_size: int
    steps: Tensor
    batch_size: int
    in_factors: bool

    def costs(self, num_examples: Tensor) -> Tensor:
        """[N] samples that a client with these goes through in a job, and one for coming at all."""
        return 1 + self.steps * num_examples.cpu().clamp(max=self.batch_size)


def work_of(strategy: Strategy, num_examples: Tensor) -> Work:
    """The work of clients with these samples [N]; of a strategy without local training one step on all of them."""
    n, most, traits = num_examples.cpu(), int(num_examples.max()), strategy.traits
    cohort_size, single = strategy.at_work(len(n)), traits.local_rules == "rate"
    local = next(iter(parts(strategy, LocalTraining).values()), None)
    if local is None:
        return Work(cohort_size, torch.ones_like(n), most, False)
    return Work(
        cohort_size,
        torch.ones_like(n) if single else local.schedule.num_steps(n),
        min(local.schedule.batch_size or most, most),
        local.constant_rate and not (single or traits.two_points),
    )


def in_words(work: Work, plan: Plan, layout: Layout, num_examples: Tensor) -> dict[str, str]:
    """The plan, line by line: {what: in words}."""
    n, steps = num_examples, work.steps
    buffers = f" and {layout.size - layout.num_trainable:,} buffer entries" if layout.num_buffers else ""
    stack_bytes = 4 * layout.size * min(plan.width, work.cohort_size)
    model_bits = 32 * layout.size
    return {
        "clients": f"{len(n):,}, {work.cohort_size:,} of them in a round",
        "samples per client": f"{int(n.min()):,} to {int(n.max()):,}, median {int(n.median()):,}; "
        f"{int((n == 0).sum()):,} clients have none",
        "local steps": f"{int(steps.min()):,} to {int(steps.max()):,}",
        "model": f"{layout.num_trainable:,} parameters{buffers}",
        "engine": f"{plan.engine}{' with C++' if plan.native else ''}, {plan.width} clients a stack ({plan.reason})",
        "memory": f"about {3 * stack_bytes / 2**20:,.1f} MiB a worker for parameters, gradients and one buffer",
        "bits per round": f"{model_bits * work.cohort_size / 1e6:,.2f} Mbit down and as many up for every model-sized "
        "message",
    }
