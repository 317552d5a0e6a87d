"""The two ways in which Ray workers fold, as ratios: between each other over gloo, and through the object store.

    python -m benchmarks.planes [--sizes 100000 1000000 10000000] [--groups 2 8] [--workers 2] [--repeats 7] [--nodes 2]

Each group of stacks replies one vector of the model's size that costs nothing to compute, so a call is the way of
the model to the workers and of the sums back. The ways take turns; a figure is milliseconds, the best of all turns, and
the ratio divides gloo by the object store: below 1, gloo, which `auto` takes on CPUs, is the faster. With nodes,
workers are on so many network namespaces of this machine, each a Ray node with one address; that needs root.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.sim.executor import Jobs, StackRunner
from fedsim.sim.ray_executor import RayExecutor
from fedsim.tasks.quadratic import QuadraticTask
from tests.fedsim.sim.namespaces import WITHOUT_TOKEN, ray_cluster, why_not

MAX_GROUPS = 64
WAYS = ("gloo", "object_store")


@dataclass(frozen=True)
class Echo:
    """A client half that sends the model back."""

    def reply(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        return {"delta": x.expand(len(clients), -1)}


def milliseconds(executor: RayExecutor, size: int, groups: int) -> float:
    """One folded call."""
    ids = torch.arange(groups)
    model, weights = torch.ones(size), torch.full((groups,), 1 / groups)
    jobs = Jobs("reply", ids, torch.zeros_like(ids), [{"x": model}], torch.zeros_like(ids), weights=weights)
    start = time.perf_counter()
    got = executor.run(jobs).sums["delta"]
    seconds = time.perf_counter() - start
    assert torch.equal(got, model), "the mean of equal models"
    return 1e3 * seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 8], help="powers of two, at most 64")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--nodes", type=int, default=1, help="namespaces, each with a Ray node; 1 for this machine as it is"
    )
    parser.add_argument("--address", help="of a running cluster with two CPUs for each worker")
    args = parser.parse_args()
    if args.nodes > 1:
        across(args.nodes, args.workers, sys.argv[1:])
        return
    measure(args)


def across(nodes: int, workers: int, arguments: list[str]) -> None:
    """This command on the first of so many nodes."""
    if (reason := why_not()) is not None:
        print(f"no workers on {nodes} nodes: {reason}")
        return
    with ray_cluster(nodes, cpus=-(-2 * workers // nodes)) as (found, address):
        command = [sys.executable, "-m", "benchmarks.planes", *arguments, "--nodes", "1", "--address", address]
        print(f"on {nodes} nodes:", flush=True)
        assert found[0].start(command, env=os.environ | WITHOUT_TOKEN).wait() == 0


def measure(args: argparse.Namespace) -> None:
    """The table."""
    task = QuadraticTask.drawn(MAX_GROUPS, 1, seed=0)
    runner = StackRunner(task, Echo(), seed=0, device=torch.device("cpu"))
    import ray

    if args.address is None:
        ray.init(address="local", num_cpus=2 * args.workers, num_gpus=0, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=args.address, log_to_driver=False)
    ways = {way: RayExecutor(runner, width=1, workers=args.workers, collectives=way) for way in WAYS}
    print(f"{args.workers} workers\n{'P':>10}{'groups':>8}{'gloo':>10}{'store':>10}{'ratio':>8}")
    for size, groups in product(args.sizes, args.groups):
        for executor in ways.values():
            milliseconds(executor, size, groups)
        turns = [{w: milliseconds(executor, size, groups) for w, executor in ways.items()} for _ in range(args.repeats)]
        gloo, store = (min(turn[way] for turn in turns) for way in WAYS)
        print(f"{size:>10,}{groups:>8}{gloo:>10.1f}{store:>10.1f}{gloo / store:>8.2f}", flush=True)
    for executor in ways.values():
        executor.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
