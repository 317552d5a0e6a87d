"""What clients will do in a round, asked of the strategy that will run, and the plan in words."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.clients.local_training import LocalTraining
from fedsim.engine import Plan
from fedsim.params import Layout, frozen_tensors
from fedsim.sim.absence import Absence
from fedsim.sim.executor import cut
from fedsim.strategies.peers import Peers
from fedsim.strategy import Strategy, fields_of
from fedsim.topology import overview

LOOKS, CLIENT_LOOKS = 200, 20_000_000  # moments at which a plan counts who is on line, and clients counted in all
WORKERS = (2, 4, 8)  # of which a plan says what they would gain


@dataclass(frozen=True)
class Work:
    """What engine and stack width are chosen for.

    Args:
        cohort_size: clients of a round.
        steps: [N] local steps of each client.
        batch_size: samples of a step at most.
        in_factors: whether local training can keep its steps in factors, on models that have them.
        state_bytes: what the local optimizer keeps for one client.
    """

    cohort_size: int
    steps: Tensor
    batch_size: int
    in_factors: bool
    state_bytes: int

    def costs(self, num_examples: Tensor) -> Tensor:
        """[N] samples that a client with these goes through in a job, and one for coming at all."""
        return 1 + self.steps * num_examples.cpu().clamp(max=self.batch_size)


def work_of(strategy: Strategy, num_examples: Tensor) -> Work:
    """The work of clients with these samples [N]; of a strategy without local training one step on all of them."""
    n, most, traits = num_examples.cpu(), int(num_examples.max()), strategy.traits
    cohort_size, single = strategy.at_work(len(n)), traits.local_rules == "rate"
    local = next(iter(fields_of(strategy, LocalTraining).values()), None)
    if local is None:
        return Work(cohort_size, torch.ones_like(n), most, False, 0)
    return Work(
        cohort_size,
        torch.ones_like(n) if single else local.schedule.num_steps(n),
        min(local.schedule.batch_size or most, most),
        local.constant_rate and not (single or traits.two_points),
        local.optimizer.state_bytes,
    )


def speedup(shares: Sequence[float], workers: int) -> float:
    """How many times faster than one worker so many are at best, each taking the next stack when it is free.

    Args:
        shares: what each stack costs, in the order in which they are taken.
        workers: how many there are.

    >>> [speedup([3.0, 2.0, 2.0, 1.0], workers) for workers in (1, 2, 4)]
    [1.0, 2.0, 2.6666666666666665]
    """
    busy = [0.0] * workers
    for share in shares:
        heapq.heapreplace(busy, busy[0] + share)
    return sum(shares) / max(busy) if any(shares) else 1.0


def shares_of(work: Work, num_examples: Tensor, width: int, stacks: int) -> list[float]:
    """What each stack of a typical cohort costs, whose clients stand evenly in the order of their samples."""
    n, order = num_examples.cpu(), torch.argsort(num_examples.cpu())
    size = min(work.cohort_size, len(n))
    ids = order[(torch.arange(size) * 2 + 1) * len(n) // (2 * size)]
    each = work.costs(n)[ids].double()
    return [float(each[stack].sum()) for stack in cut(n[ids], width, stacks)]


def selection_in_words(strategy: Mapping[str, Any]) -> dict[str, str]:
    """{"selection": its name and settings} of a resolved section `strategy` that has one."""
    if "selection" not in strategy:
        return {}
    section = {k: v for k, v in strategy["selection"].items() if not isinstance(v, list | tuple)}
    settings = ", ".join(f"{k} {v}" for k, v in section.items() if k != "name")
    return {"selection": f"{section['name']} ({settings})" if settings else section["name"]}


def absence_in_words(absence: Absence, cohort_size: int, num_clients: int, seconds: float) -> str:
    """What share of clients and rounds the availability leaves, over so many seconds of a run."""
    ids, deaths = torch.arange(num_clients), absence.dropout.probability
    looks = min(LOOKS, max(1, CLIENT_LOOKS // num_clients))
    times = [seconds * (k + 0.5) / looks for k in range(looks)]
    there = torch.tensor([int(absence.on_line(ids, t).sum()) for t in times], dtype=torch.float64)
    enough = float((there >= cohort_size).double().mean())
    words = [
        f"{float(there.mean()):,.1f} of {num_clients:,} clients on line on average ({int(there.min()):,} to "
        f"{int(there.max()):,}) over about {seconds:,.3g} s; {cohort_size:,} at once in {enough:.0%} of rounds"
    ]
    if deaths:
        words.append(f"{deaths:.0%} of jobs die")
    return "; ".join(words if absence.away else words[1:])


def in_words(work: Work, plan: Plan, stacks: int, layout: Layout, sent: Layout, num_examples: Tensor) -> dict[str, str]:
    """The plan, line by line: {what: in words}."""
    n, steps = num_examples, work.steps
    buffers = f" and {layout.size - layout.num_trainable:,} buffer entries" if layout.num_buffers else ""
    stack_bytes = min(plan.width, work.cohort_size) * (3 * 4 * layout.size + work.state_bytes)
    model_bits = 32 * sent.size
    kept = f", of which {layout.size - sent.size:,} stay with the client" if sent.size < layout.size else ""
    wide = f"{plan.width} client{'s' * (plan.width != 1)}"
    shares = shares_of(work, n, plan.width, stacks)
    counts, gains = zip(*((str(w), f"{speedup(shares, w):.1f}") for w in WORKERS), strict=True)
    how = " with C++" if plan.native else " in CUDA graphs" if plan.graphs else ""
    return {
        "clients": f"{len(n):,}, {work.cohort_size:,} of them in a round",
        "samples per client": f"{int(n.min()):,} to {int(n.max()):,}, median {int(n.median()):,}; "
        f"{int((n == 0).sum()):,} clients have none",
        "local steps": f"{int(steps.min()):,} to {int(steps.max()):,}",
        "model": f"{layout.num_trainable:,} parameters{buffers}{kept}",
        "engine": f"{plan.engine}{how}, {wide} a stack ({plan.reason})",
        "stacks": f"{len(shares):,} a round; with {', '.join(counts)} workers {', '.join(gains)} times one worker's "
        "speed at best",
        "memory": f"about {stack_bytes / 2**20:,.1f} MiB a worker for parameters, gradients, one buffer and the "
        "optimizer's state; activations, the data and Python itself come on top",
        "bits per round": f"{model_bits * work.cohort_size / 1e6:,.2f} Mbit down and as many up for every model-sized "
        "message",
    }


def topology_in_words(strategy: Strategy, num_clients: int, sent: Layout, seed: int) -> dict[str, str]:
    """{"topology": how many neighbours peers have, and how fast they agree}, and bits, of a strategy that has peers."""
    if not isinstance(strategy, Peers):
        return {}
    graphs, gap = overview(strategy.topology, num_clients, seed)
    degrees = torch.cat([graph.counts for graph in graphs]) - 1
    few, most = int(degrees.min()), int(degrees.max())
    mean = f"{few} to {most} neighbours, {float(degrees.double().mean()):.1f} on average"
    links = f"{few} neighbour{'s' * (few != 1)} each" if few == most else mean
    over = f" a step, over {len(graphs)} of them" if len(graphs) > 1 else ""
    messages = int(degrees.sum()) // len(graphs)
    links = f"{links}, {messages:,} messages a step"
    return {
        "topology": links if gap is None else f"{links}; spectral gap {gap:.3g}{over}",
        "bits per round": f"{32 * sent.size * messages / 1e6:,.2f} Mbit between peers for every model-sized message",
    }


def frozen_in_words(module: nn.Module) -> dict[str, str]:
    """{"frozen": what every worker has one copy of} where a model has frozen parameters."""
    tensors = frozen_tensors(module)
    frozen = sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter))
    if not frozen:
        return {}
    mebibytes = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    return {"frozen": f"{frozen:,} parameters ({mebibytes:,.1f} MiB), one copy a worker; they never travel"}
