"""elder: the server."""

import numpy as np
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


def server_fn(context: Context) -> ServerAppComponents:
    settings = context.run_config
    strategy = FedAvg(
        fraction_fit=float(settings["fraction-train"]),
        min_fit_clients=2,
        initial_parameters=ndarrays_to_parameters([np.zeros(1)]),
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(settings["num-server-rounds"])))


app = ServerApp(server_fn=server_fn)
