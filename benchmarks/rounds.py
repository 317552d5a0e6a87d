"""Whole rounds of FedAvg beside the plain loop, in one run: the standing workloads W1, W2, W3.

    python -m benchmarks.rounds [--workloads w1 w2 w3] [--rounds 8] [--engines auto stacked] [--json FILE]

W1  1,000 clients x 60 images, MLP 784-200-10, batch 20 (3 steps), 100 clients a round
W2  the same data, LEAF's CNN (1,663,370 parameters), 50 clients a round
W3  10 clients x 6,000 images, the MLP, batch 64 (94 steps), all 10 a round

SGD 0.05, one epoch, fixed order of samples, evaluation outside the timing. Rounds of all systems are interleaved, in an
order drawn anew each round, so that a drift of the machine and warm caches serve them alike; shown are the best and the
median. The ratio compares the best of fedsim with the best of the faster plain loop. Results of all systems must agree
(largest difference shown).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain import OneProcess, Problem, Processes
from fedsim.aggregate import Mean
from fedsim.clients.local_training import LocalTraining
from fedsim.data import DATASETS, FederatedData
from fedsim.engine import build_engine, choose_engine
from fedsim.engine.choose import graphed
from fedsim.engine.losses import LOSSES
from fedsim.memory import Memory
from fedsim.optim import build
from fedsim.params import Layout
from fedsim.sim.devices import Constant
from fedsim.sim.executor import StackRunner
from fedsim.sim.fleet import SimFleet
from fedsim.sim.in_process import InProcess
from fedsim.strategies.fedavg import FedAvg
from fedsim.task import Schedule
from fedsim.tasks.models import MODELS, init_parameters
from fedsim.tasks.supervised import SupervisedTask

LR = 0.05


@dataclass(frozen=True)
class Workload:
    """So many clients with so many samples each, and the model they train."""

    model: str
    clients: int
    samples: int
    batch: int
    cohort: int


WORKLOADS = {
    "w1": Workload("mlp", 1000, 60, 20, 100),
    "w2": Workload("cnn", 1000, 60, 20, 50),
    "w3": Workload("mlp", 10, 6000, 64, 10),
}


def images() -> Any:
    """Fashion-MNIST where it is installed, else random images of the same size."""
    try:
        return DATASETS["fashion_mnist"]()
    except ValueError:
        return DATASETS["blobs"](num_examples=60_000, shape=(1, 28, 28), num_classes=10, seed=0)


class Fedsim:
    """Rounds on a fleet, with the cohorts that the plain loop has."""

    def __init__(self, load: Workload, problem: Problem, data: FederatedData, precision: str, engine: str) -> None:
        device = problem.x0.device
        factory = partial(MODELS[load.model], (1, 28, 28), 10)
        module, x0 = init_parameters(factory, seed=0)
        layout = Layout.of_module(module)
        steps = -(-load.samples // load.batch)
        plan = choose_engine(
            module,
            layout,
            device=device,
            batch_size=load.batch,
            steps=steps,
            num_clients=load.cohort,
            engine=engine,
            precision=precision,
            plain=True,
        )
        options = {"native": plan.native, "graphs": graphed(plan.engine, device)}
        built = build_engine(plan.engine, module, layout, device=device, precision=precision, **options)
        self.task = SupervisedTask(data, module, x0, built, LOSSES["cross_entropy"])
        local = LocalTraining(
            optimizer=build({"name": "sgd", "lr": LR}, layout),
            schedule=Schedule(epochs=1, batch_size=load.batch, shuffle=False),
        )
        self.strategy = FedAvg(local=local)
        runner = StackRunner(self.task, self.strategy, 0, device)
        workers = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
        self.executor = InProcess(runner, width=plan.width, workers=workers)
        self.fleet = SimFleet(
            num_examples=self.task.num_examples,
            model_size=layout.size,
            executor=self.executor,
            devices=Constant(),
            memory=Memory(load.clients),
            seed=0,
        )
        self.x = problem.x0.clone()
        self.cohorts = problem.cohorts

    def round(self, r: int) -> None:
        local, fold = self.strategy.local, Mean()
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as fedsim.loop does: the server's sums run on a worker's number of threads
        replies = self.fleet.ask(self.cohorts[r], self.strategy.local_update, cost=local.cost, fold=fold, x=self.x)
        self.x = self.x - replies["delta"]
        torch.set_num_threads(before)

    def close(self) -> None:
        self.executor.close()


def measure(
    name: str, rounds: int, precisions: list[str], engines: list[str], device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Times of all systems on one workload; on a GPU the plain loop is one process."""
    device = torch.device(device)
    load, source = WORKLOADS[name], images()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(source.inputs), generator=generator)[: load.clients * load.samples]
    cohorts = torch.stack([torch.randperm(load.clients, generator=generator)[: load.cohort] for _ in range(rounds)])
    module, x0 = init_parameters(partial(MODELS[load.model], (1, 28, 28), 10), seed=0)
    problem = Problem(
        make=partial(MODELS[load.model], (1, 28, 28), 10),
        x0=x0.to(device),
        inputs=source.inputs.to(device),
        targets=source.targets.to(device),
        rows=rows.view(load.clients, load.samples),
        batch=load.batch,
        lr=LR,
        cohorts=cohorts.sort(dim=1).values,
    )
    data = FederatedData(
        inputs=source.inputs,
        targets=source.targets,
        offsets=torch.arange(load.clients + 1) * load.samples,
        order=rows,
        test_inputs=source.test_inputs,
        test_targets=source.test_targets,
        num_classes=10,
    ).to(device)
    cores = len(os.sched_getaffinity(0))
    systems: dict[str, Any] = {f"plain, 1 process x {cores} threads": OneProcess(problem, cores)}
    if device.type == "cpu":
        systems[f"plain, {cores} processes x 1 thread"] = Processes(problem, cores)
    for precision, engine in product(precisions, engines):
        label = ", ".join(["fedsim", *(x for x in (precision, engine) if x not in ("fp32", "auto"))])
        systems[label] = Fedsim(load, problem, data, precision, engine)
    times: dict[str, list[float]] = {k: [] for k in systems}
    turns = random.Random(0)
    for r in range(rounds):
        for label in turns.sample(list(systems), len(systems)):  # who comes after a relative finds the cache warm
            start = time.perf_counter()
            systems[label].round(r)
            float(systems[label].x[0])  # a GPU is done with the round only now
            times[label].append(time.perf_counter() - start)
    reference = next(s.x for k, s in systems.items() if k.startswith("fedsim"))
    differences = {k: float((s.x - reference).abs().max()) for k, s in systems.items()}
    for system in systems.values():
        system.close()
    best = {k: min(v[1:]) for k, v in times.items()}
    plain = min(v for k, v in best.items() if k.startswith("plain"))
    return {
        "workload": name,
        "systems": {
            k: {
                "first_ms": 1e3 * v[0],
                "best_ms": 1e3 * best[k],
                "median_ms": 1e3 * statistics.median(v[1:]),
                "ratio": plain / best[k],
                "difference": differences[k],
            }
            for k, v in times.items()
        },
    }


def machine() -> str:
    """One line about where the figures come from."""
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precisions", nargs="*", default=["fp32"])
    parser.add_argument("--engines", nargs="*", default=["auto"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(machine())
    results = [measure(w, arguments.rounds, arguments.precisions, arguments.engines) for w in arguments.workloads]
    for result in results:
        print(f"\n{result['workload'].upper():34s} {'first':>9s} {'best':>9s} {'median':>9s}  ratio  difference")
        for label, row in result["systems"].items():
            print(
                f"{label:34s} {row['first_ms']:7.1f}ms {row['best_ms']:7.1f}ms {row['median_ms']:7.1f}ms "
                f"{row['ratio']:5.2f}x  {row['difference']:.1e}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
