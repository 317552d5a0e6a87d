"""elder: the client, in the style of Flower's older quick start."""

import numpy as np
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context


class Line(NumPyClient):
    """y = (1 + partition) x at 8 points."""

    def __init__(self, partition: int) -> None:
        self.x = np.linspace(-1, 1, 8)
        self.y = (1 + partition) * self.x

    def fit(self, parameters, config):  # type: ignore[no-untyped-def]
        w = parameters[0]
        i = np.random.permutation(8)[:4]
        w = w - 0.1 * ((w * self.x[i] - self.y[i]) * self.x[i]).mean()
        return [w], 8, {"drawn": float(np.random.rand())}

    def evaluate(self, parameters, config):  # type: ignore[no-untyped-def]
        return float(((parameters[0] * self.x - self.y) ** 2).mean()), 8, {"slope": float(parameters[0][0])}


def client_fn(context: Context) -> Client:
    return Line(int(context.node_config["partition-id"])).to_client()


app = ClientApp(client_fn=client_fn)
