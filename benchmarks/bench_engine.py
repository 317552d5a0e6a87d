"""Local training alone: the engine on stacks of clients against a plain PyTorch loop, in one run.

    python benchmarks/bench_engine.py [--workloads w1 w2 w3] [--repeats 9] [--precision fp32] [--width auto]

Workloads as in docs/benchmarks.md: W1 100 clients x 3 steps of 20 (MLP 784-200-10), W2 50 clients x 3 steps of 20
(LEAF's CNN), W3 10 clients x 94 steps of 64 (the MLP). Times are milliseconds for all clients of a round: copying
the model to each client, gathering its minibatches and its steps; no averaging, no evaluation. The best and the
median of all repeats are shown; the ratio compares best with best.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing.synchronize import Barrier, Event

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from fedsim.engine import Batch, Plan, build_engine, choose
from fedsim.params import Layout
from fedsim.tasks.models import MODELS, init_parameters


@dataclass(frozen=True)
class Workload:
    """So many clients, each with `steps` batches, and the model they train."""

    model: str
    clients: int
    steps: int
    batch: int


WORKLOADS = {
    "w1": Workload("mlp", 100, 3, 20),
    "w2": Workload("cnn", 50, 3, 20),
    "w3": Workload("mlp", 10, 94, 64),
}
LR = 0.05


@dataclass(frozen=True)
class Problem:
    """A workload's data: a pool of samples, and which of them each client uses in each step."""

    load: Workload
    module: nn.Module
    x0: Tensor
    inputs: Tensor
    targets: Tensor
    rows: Tensor  # [clients, steps, batch]

    @classmethod
    def make(cls, load: Workload) -> Problem:
        generator = torch.Generator().manual_seed(0)
        module, x0 = init_parameters(partial(MODELS[load.model], (1, 28, 28), 10), seed=0)
        samples = load.clients * load.steps * load.batch
        inputs = torch.randn(samples, 1, 28, 28, generator=generator)
        targets = torch.randint(0, 10, (samples,), generator=generator)
        rows = torch.randperm(samples, generator=generator).view(load.clients, load.steps, load.batch)
        return cls(load, module, x0, inputs, targets, rows)


def stacked_round(problem: Problem, plan: Plan, precision: str, threads: int) -> Callable[[], None]:
    """A round on the engine, by Python threads of one intra-op thread each."""
    layout = Layout.of_module(problem.module)
    width = plan.width
    engine = build_engine(plan.engine, problem.module, layout, precision=precision, native=plan.native)
    buffers = threading.local()

    def work(jobs: queue.SimpleQueue[int]) -> None:
        while True:
            try:
                start = jobs.get_nowait()
            except queue.Empty:
                return
            rows = problem.rows[start : start + width]
            clients = len(rows)
            if not hasattr(buffers, "x"):
                buffers.x = torch.empty(width, layout.size)
            x = buffers.x[:clients].copy_(problem.x0)
            session = engine.session(x)
            for step in range(problem.load.steps):
                index = rows[:, step]
                inputs = problem.inputs.index_select(0, index.flatten()).unflatten(0, index.shape)
                targets = problem.targets.index_select(0, index.flatten()).unflatten(0, index.shape)
                batch = Batch(inputs, targets, step=step)
                if session.sgd_step_(batch, LR) is None:
                    gradient, _ = session.gradient(batch)
                    x.sub_(gradient, alpha=LR)

    def round_() -> None:
        jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
        for start in range(0, problem.load.clients, width):
            jobs.put(start)
        pool.run(lambda: work(jobs))

    pool = Threads(threads)
    return round_


class Threads:
    """Threads that live as long as the benchmark, so that their buffers do."""

    def __init__(self, count: int) -> None:
        self.inboxes: list[queue.SimpleQueue[Callable[[], None]]] = [queue.SimpleQueue() for _ in range(count)]
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        for inbox in self.inboxes:
            threading.Thread(target=self._serve, args=(inbox,), daemon=True).start()

    def run(self, task: Callable[[], None]) -> None:
        for inbox in self.inboxes:
            inbox.put(task)
        for _ in self.inboxes:
            self.done.get()

    def _serve(self, inbox: queue.SimpleQueue[Callable[[], None]]) -> None:
        torch.set_num_threads(1)
        while True:
            task = inbox.get()
            task()
            self.done.put(None)


def plain_round(problem: Problem, part: int = 0, parts: int = 1) -> Callable[[], None]:
    """A round as one writes it in plain PyTorch: one module, one optimizer per client."""
    module, loss_of = problem.module, nn.CrossEntropyLoss()
    start = {k: v.clone() for k, v in module.state_dict().items()}

    def round_() -> None:
        for client in range(part, problem.load.clients, parts):
            module.load_state_dict(start)
            optimizer = torch.optim.SGD(module.parameters(), lr=LR)
            for index in problem.rows[client]:
                optimizer.zero_grad()
                loss_of(module(problem.inputs[index]), problem.targets[index]).backward()
                optimizer.step()

    return round_


class PlainProcesses:
    """A round by processes of one thread each, which wait between rounds."""

    def __init__(self, load: Workload, count: int = 2) -> None:
        context = mp.get_context("spawn")
        self.barrier = context.Barrier(count + 1)
        self.stop = context.Event()
        self.workers = [
            context.Process(target=_plain_worker, args=(load, part, count, self.barrier, self.stop), daemon=True)
            for part in range(count)
        ]
        for worker in self.workers:
            worker.start()

    def __call__(self) -> None:
        self.barrier.wait()
        self.barrier.wait()

    def close(self) -> None:
        self.stop.set()
        self.barrier.wait()
        for worker in self.workers:
            worker.join()


def _plain_worker(load: Workload, part: int, parts: int, barrier: Barrier, stop: Event) -> None:
    torch.set_num_threads(1)
    round_ = plain_round(Problem.make(load), part, parts)
    while True:
        barrier.wait()
        if stop.is_set():
            return
        round_()
        barrier.wait()


def with_threads(count: int, round_: Callable[[], None]) -> Callable[[], None]:
    """The round with so many intra-op threads."""

    def run() -> None:
        torch.set_num_threads(count)
        round_()
        torch.set_num_threads(1)

    return run


def measure(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repeat. Variants take turns, so that what else the machine does hits all of them."""
    for round_ in variants.values():
        round_()
    times: dict[str, list[float]] = {label: [] for label in variants}
    for _ in range(repeats):
        for label, round_ in variants.items():
            began = time.perf_counter()
            round_()
            times[label].append((time.perf_counter() - began) * 1e3)
    return times


def variants_of(load: Workload, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """The engine at the widths, precisions and numbers of threads asked for."""
    problem = Problem.make(load)
    layout = Layout.of_module(problem.module)
    yield "plain, 1 process, 2 threads", with_threads(2, plain_round(problem))
    for precision, width, threads in product(args.precision, args.width, args.threads):
        plan = choose(
            problem.module,
            layout,
            batch_size=load.batch,
            steps=load.steps,
            num_clients=load.clients,
            engine=args.engine,
            stack=width if width == "auto" else int(width),
            precision=precision,
        )
        label = f"{plan.engine} {precision}, stacks of {plan.width}, {threads} Python threads"
        yield label, stacked_round(problem, plan, precision, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--width", nargs="+", default=["auto"], help="clients a stack; several are all measured")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.workloads:
        load = WORKLOADS[name]
        processes = PlainProcesses(load)
        times = measure({PROCESSES: processes, **dict(variants_of(load, args))}, args.repeats)
        processes.close()
        reference = min(min(found) for label, found in times.items() if label.startswith("plain"))
        for label, found in times.items():
            ratio = reference / min(found)
            middle = statistics.median(found)
            print(f"{name}  {label:48}  best {min(found):7.1f} ms  median {middle:7.1f}  {ratio:5.2f}x", flush=True)


PROCESSES = "plain, 2 processes, 1 thread"

if __name__ == "__main__":
    main()
