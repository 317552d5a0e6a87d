"""The yardstick: FedAvg as a plain PyTorch loop, one client after the other, in one process or in several.

Each client loads the server's weights into one resident module, takes its steps with torch.optim.SGD, and adds its
weights to a running sum. With several processes each takes a share of the clients and the sums meet in shared memory.

Letters: P parameters, S clients of a round, K steps, B samples of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters


@dataclass(frozen=True)
class Problem:
    """What is trained on what.

    Args:
        make: builds the module.
        x0: [P] initial parameters.
        inputs, targets: the pool of samples.
        rows: [N, n] each client's samples, in order.
        batch: B.
        lr: of SGD.
        cohorts: [rounds, S] the clients of each round.
    """

    make: Callable[[], nn.Module]
    x0: Tensor
    inputs: Tensor
    targets: Tensor
    rows: Tensor
    batch: int
    lr: float
    cohorts: Tensor


def local_sum(problem: Problem, module: nn.Module, x: Tensor, clients: list[int]) -> Tensor:
    """[P]: the sum of these clients' models after one epoch from x."""
    total = torch.zeros_like(x)
    for client in clients:
        vector_to_parameters(x.clone(), module.parameters())
        optimizer = torch.optim.SGD(module.parameters(), lr=problem.lr)
        for chunk in problem.rows[client].split(problem.batch):
            optimizer.zero_grad()
            cross_entropy(module(problem.inputs[chunk]), problem.targets[chunk]).backward()
            optimizer.step()
        total += parameters_to_vector(module.parameters()).detach()
    return total


class OneProcess:
    """All clients in this process.

    Args:
        problem: what to run.
        threads: intra-op threads.
    """

    def __init__(self, problem: Problem, threads: int) -> None:
        self.problem, self.threads, self.x = problem, threads, problem.x0.clone()
        self.module = problem.make().to(problem.x0.device)

    def round(self, r: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        clients = self.problem.cohorts[r].tolist()
        self.x = local_sum(self.problem, self.module, self.x, clients) / len(clients)
        torch.set_num_threads(before)

    def close(self) -> None:
        pass


class Processes:
    """Clients shared out over processes of one thread each, started once; sums and model in shared memory.

    Args:
        problem: what to run.
        count: processes.
    """

    def __init__(self, problem: Problem, count: int) -> None:
        context = mp.get_context("spawn")
        self.x = problem.x0.clone().share_memory_()
        self.sums = torch.zeros(count, len(self.x)).share_memory_()
        problem.inputs.share_memory_()
        self.num_clients = problem.cohorts.shape[1]
        self.orders, self.done = [context.Queue() for _ in range(count)], context.Queue()
        self.workers = [
            context.Process(target=_work, args=(problem, self.x, self.sums, i, self.orders[i], self.done), daemon=True)
            for i in range(count)
        ]
        for worker in self.workers:
            worker.start()
        for _ in self.workers:
            self.done.get()

    def round(self, r: int) -> None:
        for order in self.orders:
            order.put(r)
        for _ in self.workers:
            self.done.get()
        self.x.copy_(self.sums.sum(0) / self.num_clients)

    def close(self) -> None:
        for order in self.orders:
            order.put(None)
        for worker in self.workers:
            worker.join(timeout=10)


def _work(problem: Problem, x: Tensor, sums: Tensor, index: int, orders: Any, done: Any) -> None:
    torch.set_num_threads(1)
    module = problem.make()
    done.put("ready")
    while (r := orders.get()) is not None:
        clients = problem.cohorts[r].tolist()[index :: len(sums)]
        sums[index].copy_(local_sum(problem, module, x, clients))
        done.put(time.time())
