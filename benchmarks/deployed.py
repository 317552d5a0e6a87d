"""Seconds of a message to a device and of a round of a deployment, beside a plain Flower app, taking turns.

    python -m benchmarks.deployed [--repeats 3] [--rounds 4]

Three apps train the same perceptron on as many samples, on two devices: `flower` is plain Flower, `stays` is exported
by fedsim, and `cold` is the same without the process that stays, so that every message imports torch and composes the
experiment. Of a message it shows CPU seconds of the process that Flower starts for it (plain Flower's trains in it, for
a few hundredths of a second); of a round, on a SuperLink and two SuperNodes of this machine, its median wall seconds
after the first. `--rounds 0` leaves the federation out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

from fedsim import apps
from fedsim.flower.deployment import Deployment, deployed
from fedsim.flower.export import EXPERIMENT, PYPROJECT

EXPERIMENT_FILE = """\
rounds: 1
task: {name: classification, dataset: digits, model: {name: mlp, hidden: [50]}}
clients: {count: 2}
strategy: {name: fedavg}
local: {epochs: 1, batch_size: 20, optimizer: {name: sgd, lr: 0.1}}
"""
MODEL = """\
from torch import nn


def model():
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
"""
PLAIN_CLIENT = """\
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional as F

from experiment.model import model

app = ClientApp()


@app.train()
def train(message, context):
    net = model()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = torch.randn(720, 64), torch.randint(10, (720,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in torch.randperm(720).split(20):
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": 720})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)
"""
PLAIN_SERVER = """\
import time

from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from experiment.model import model

app = ServerApp()


@app.main()
def main(grid, context):
    def note(server_round, arrays):
        with open(context.run_config["fedsim-out"], "a") as file:
            print(time.monotonic(), file=file)

    rounds = int(context.run_config["fedsim-overrides"].removeprefix("rounds="))
    arrays = ArrayRecord(model().state_dict())
    FedAvg(fraction_evaluate=0.0).start(grid, arrays, num_rounds=rounds, evaluate_fn=note)
"""
ONE_MESSAGE = """\
import resource, sys
import flwr.supernode.runtime.run_clientapp  # what `flwr-clientapp` imports
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

sys.path.insert(0, sys.argv[1])
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
from experiment.client_app import app

plain = sys.argv[2] == "flower"
content = RecordDict()
if plain:
    from experiment.model import model
    content["arrays"] = ArrayRecord(model().state_dict())
kind = "train" if plain else "query"
message = Message(content, 5, kind)
message.metadata.__dict__["_message_id"] = "1"
app(message, Context(1, 5, {"partition-id": 0}, RecordDict(), {}))
used = resource.getrusage(resource.RUSAGE_SELF)
open(sys.argv[3], "w").write(str(used.ru_utime + used.ru_stime))
"""


def write_apps(folder: Path) -> dict[str, Path]:
    """{name: folder} of the three."""
    (folder / "fedavg.yaml").write_text(EXPERIMENT_FILE)
    found = {name: apps.export(folder / "fedavg.yaml", folder / name) for name in ("stays", "cold", "flower")}
    cold = found["cold"] / "experiment" / "client_app.py"
    cold.write_text(cold.read_text().replace("fedsim.warm", "fedsim.apps"))
    plain = found["flower"] / "experiment"
    for name, text in {"client_app": PLAIN_CLIENT, "server_app": PLAIN_SERVER, "model": MODEL}.items():
        (plain / f"{name}.py").write_text(text)
    (plain.parent / EXPERIMENT).unlink()
    for name, app in found.items():
        (app / "pyproject.toml").write_text(PYPROJECT.replace("fedsim-experiment", f"bench-{name}"))
    return found


def cpu_of_message(app: Path, name: str) -> float:
    """CPU seconds of a fresh process that does what Flower's does for one message."""
    said = app.with_suffix(".seconds")  # a pipe would stay open as long as the process that stays
    subprocess.run([sys.executable, "-c", ONE_MESSAGE, str(app), name, str(said)], check=True)
    return float(said.read_text())


def seconds_of_rounds(deployment: Deployment, app: Path, out: Path, rounds: int) -> list[float]:
    """Wall seconds of each round but the first."""
    run = deployment.submit(app, {"fedsim-overrides": f"rounds={rounds}", "fedsim-out": str(out)})
    deployment.follow(run)
    if out.is_dir():
        times = [json.loads(line)["virtual_seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    else:
        times = [float(line) for line in out.read_text().splitlines()][1:]  # the first is before round 1
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = write_apps(folder)
        cpu_of_message(found["stays"], "stays")  # starts the process that stays
        turns = [{name: cpu_of_message(app, name) for name, app in found.items()} for _ in range(options.repeats)]
        for name in found:
            print(f"{name:8} {median(turn[name] for turn in turns):6.2f} CPU seconds a message")
        print(f"load {os.getloadavg()[0]:.1f}")
        if options.rounds:
            with deployed(folder / "federation", 2, random.randrange(20000, 30000), lambda command: None) as deployment:
                for name, app in found.items():
                    took = seconds_of_rounds(deployment, app, folder / f"{name}-run", options.rounds)
                    print(f"{name:8} {median(took):6.1f} seconds a round; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
