"""One Flower app on `fedsim flower run`'s grid beside Flower's own simulation, in one process, taking turns.

    python -m benchmarks.flower_app [--clients 10 100] [--rounds 5] [--repeats 3] [--hidden 32] [--steps 5]

All clients train and evaluate a small perceptron in every round. A figure is seconds of these rounds as the ServerApp
sees them, after one that is not counted, in which Flower starts its actors; the ratio is Flower's seconds over ours,
turn by turn. Flower has an actor for each core, ours one client at a time in this process.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from functools import partial
from statistics import median

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.nn import functional as F

from fedsim.flower.foreign.clocks import Clocks
from fedsim.flower.foreign.grid import SimGrid
from fedsim.flower.foreign.nodes import NodeRunner, seeded
from fedsim.flower.foreign.rounds import RoundLog
from fedsim.sim.devices import Constant


def model(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def handle(message: Message, context: Context, hidden: int, steps: int) -> Message:
    """Take steps of SGD on samples of the client's own, or none."""
    net = model(hidden)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    made = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    x, y = torch.randn(32, 64, generator=made), torch.randint(10, (32,), generator=made)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        loss = float(F.cross_entropy(net(x), y))
    content = RecordDict({"metrics": MetricRecord({"num-examples": 32, "loss": loss})})
    if steps:
        content["arrays"] = ArrayRecord(net.state_dict())
    return Message(content, reply_to=message)


def apps(hidden: int, steps: int, rounds: int, took: list[float]) -> tuple[ServerApp, ClientApp]:
    server, client = ServerApp(), ClientApp()
    client.train()(partial(handle, hidden=hidden, steps=steps))
    client.evaluate()(partial(handle, hidden=hidden, steps=0))

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = partial(FedAvg().start, grid, ArrayRecord(model(hidden).state_dict()))
        start(num_rounds=1)
        began = time.perf_counter()
        start(num_rounds=rounds)
        took.append(time.perf_counter() - began)

    return server, client


def ours(server: ServerApp, client: ClientApp, clients: int) -> None:
    log = RoundLog(lambda row: None)
    clocks = Clocks(count=clients, devices=Constant())
    grid = SimGrid(NodeRunner(client, clients, {}, 0).answers, clocks, log, lambda node, reason: None)
    with seeded(0, "flower server"):
        server(grid, Context(1, 1, {}, RecordDict(), {}))
    assert log.replies and not log.errors


def flowers(server: ServerApp, client: ClientApp, clients: int) -> None:
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=clients, backend_config=resources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    for name, default in (("rounds", 5), ("repeats", 3), ("hidden", 32), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    for clients in args.clients:
        seconds: dict[str, list[float]] = {"ours": [], "Flower's": []}
        for _ in range(args.repeats):
            for way, took in ((ours, seconds["ours"]), (flowers, seconds["Flower's"])):
                way(*apps(args.hidden, args.steps, args.rounds, took), clients)
        ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
        shown = ", ".join(f"{name} {median(s):.2f} s" for name, s in seconds.items())
        spread = f"ratio {ratios[0]:.1f} to {ratios[-1]:.1f}"
        print(f"{clients} clients, {args.rounds} rounds: {shown}; {spread}; load {os.getloadavg()[0]:.0f}", flush=True)


if __name__ == "__main__":
    main()
