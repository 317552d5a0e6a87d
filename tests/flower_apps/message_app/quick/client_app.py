"""quick: the client, in the style of Flower's own quick start."""

import random

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod

app = ClientApp()

MODS = {"ClientSideFixedClipping": fixedclipping_mod, "ClientSideAdaptiveClipping": adaptiveclipping_mod}


def clipped(message: Message, context: Context, call_next):  # type: ignore[no-untyped-def]
    """Flower's own mod, where the strategy of the run wants one at its clients."""
    mod = MODS.get(str(context.run_config["strategy"]).removeprefix("DifferentialPrivacy"))
    return call_next(message, context) if mod is None else mod(message, context, call_next)


def points(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """[8] x and y = (1 + partition) x of this client."""
    x = torch.linspace(-1, 1, 8)
    return x, (1 + int(context.node_config["partition-id"])) * x


def fail(message: Message, context: Context) -> None:
    wanted = str(context.run_config["fail"])
    if wanted and message.metadata.dst_node_id in map(int, wanted.split()):
        raise KeyError("no data on this client")


@app.train(mods=[clipped])
def train(message: Message, context: Context) -> Message:
    fail(message, context)
    w = message.content["arrays"].to_torch_state_dict()["w"]
    x, y = points(context)
    i = torch.randperm(8)[:4]  # of torch's global generator, as apps do
    gradient = ((w * x[i] - y[i]) * x[i]).mean()
    w = w - float(message.content["config"]["lr"]) * gradient
    trained = int(context.state["memory"]["trained"]) + 1 if "memory" in context.state else 1
    context.state["memory"] = MetricRecord({"trained": trained})
    drawn = {"drawn": random.random(), "drawn_np": float(np.random.rand()), "trained": trained}
    metrics = MetricRecord({"num-examples": 8, "train_loss": float(((w * x - y) ** 2).mean()), **drawn})
    return Message(RecordDict({"arrays": ArrayRecord({"w": w}), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    fail(message, context)
    w = message.content["arrays"].to_torch_state_dict()["w"]
    x, y = points(context)
    metrics = MetricRecord({"num-examples": 8, "eval_loss": float(((w * x - y) ** 2).mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    return Message(RecordDict({"who": MetricRecord({"node": context.node_id})}), reply_to=message)
