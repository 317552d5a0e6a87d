"""One Flower app on `fedsim flower run`'s grid beside Flower's own simulation, taking turns.

    python -m benchmarks.flower_app [--clients 10 100] [--rounds 5] [--repeats 3] [--hidden 32] [--steps 5]
                                    [--workers W]

All clients train and evaluate a small perceptron in every round. Ours runs in this process, one client at a time, and
on W Ray workers; Flower has an actor for each core. A figure is seconds of these rounds as the ServerApp sees them, and
those of CPU of this process and all below it, after a round that is not counted, in which actors start. A ratio is
Flower's seconds over ours, turn by turn; on a machine that does other work besides, look at CPU seconds.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"  # of runtimes that follow each other in one process, both ours and Flower's

import psutil
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.nn import functional as F

from fedsim.flower.foreign.clocks import Clocks
from fedsim.flower.foreign.grid import SimGrid
from fedsim.flower.foreign.nodes import Answering, NodeRunner, seeded
from fedsim.flower.foreign.rounds import RoundLog
from fedsim.flower.foreign.workers import NodeSetting, RayNodes
from fedsim.sim.devices import Constant

ROOT = Path(__file__).parents[1]
Took = list[tuple[float, float]]  # seconds, and those of CPU

client = ClientApp()


def model(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


@client.train()
@client.evaluate()
def handle(message: Message, context: Context) -> Message:
    """Take steps of SGD on samples of the client's own, or none."""
    settings = message.content["config"]
    net = model(int(settings["hidden"]))
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    made = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    x, y = torch.randn(32, 64, generator=made), torch.randint(10, (32,), generator=made)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(int(settings["steps"])):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        loss = float(F.cross_entropy(net(x), y))
    content = RecordDict({"metrics": MetricRecord({"num-examples": 32, "loss": loss})})
    if settings["steps"]:
        content["arrays"] = ArrayRecord(net.state_dict())
    return Message(content, reply_to=message)


def server_of(hidden: int, steps: int, rounds: int, took: Took) -> ServerApp:
    server = ServerApp()
    train, evaluate = (ConfigRecord({"hidden": hidden, "steps": s}) for s in (steps, 0))

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(model(hidden).state_dict())
        start = partial(FedAvg().start, grid, arrays, train_config=train, evaluate_config=evaluate)
        start(num_rounds=1)
        began, cpu = time.perf_counter(), cpu_seconds()
        start(num_rounds=rounds)
        took.append((time.perf_counter() - began, cpu_seconds() - cpu))

    return server


def cpu_seconds() -> float:
    """Of this process and all that it started."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def ours(server: ServerApp, clients: int) -> None:
    play(server, clients, NodeRunner(client, clients, {}, 0).answers)


def ours_on_ray(server: ServerApp, clients: int, workers: int) -> None:
    nodes = RayNodes(NodeSetting(ROOT, "benchmarks.flower_app:client", clients, {}, 0), workers=workers)
    try:
        play(server, clients, nodes.answers)
    finally:
        nodes.close()


def play(server: ServerApp, clients: int, answers: Answering) -> None:
    log = RoundLog(lambda row: None)
    grid = SimGrid(answers, Clocks(count=clients, devices=Constant()), log, lambda node, reason: print(reason))
    with seeded(0, "flower server"):
        server(grid, Context(1, 1, {}, RecordDict(), {}))
    assert log.replies and not log.errors


def flowers(server: ServerApp, clients: int) -> None:
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=clients, backend_config=resources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    for name, default in (("rounds", 5), ("repeats", 3), ("hidden", 32), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    ways: dict[str, Callable[[ServerApp, int], None]] = {
        "Flower's": flowers,
        "ours": ours,
        f"ours on {args.workers} workers": partial(ours_on_ray, workers=args.workers),
    }
    for clients in args.clients:
        found: dict[str, Took] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                way(server_of(args.hidden, args.steps, args.rounds, found[name]), clients)
        print(f"{clients} clients, {args.rounds} rounds, load {os.getloadavg()[0]:.0f}")
        for name, took in found.items():
            shown = [f"{name:>20}:"]
            for k, unit in enumerate(("s", "s of CPU")):
                ratios = sorted(f[k] / own[k] for f, own in zip(found["Flower's"], took, strict=True))
                shown.append(
                    f"{median(own[k] for own in took):6.2f} {unit}, ratio {ratios[0]:.1f} to {ratios[-1]:.1f};"
                )
            print(*shown, flush=True)


if __name__ == "__main__":
    main()
