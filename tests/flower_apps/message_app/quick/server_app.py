"""quick: the server, with the strategy that the run's settings name."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp, strategy

app = ServerApp()

NEEDED = {"QFedAvg": {"client_learning_rate": 0.1}}


def chosen(name: str, fraction_train: float) -> strategy.Strategy:
    made = getattr(strategy, name)
    if not name.startswith("DifferentialPrivacy"):
        return made(fraction_train=fraction_train, **NEEDED.get(name, {}))
    norm = {"clipping_norm": 1.0} if "Fixed" in name else {}
    plain = strategy.FedAvg(fraction_train=fraction_train)
    return made(strategy=plain, noise_multiplier=0.1, num_sampled_clients=6, **norm)


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    chosen(str(settings["strategy"]), float(settings["fraction-train"])).start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": torch.zeros(1)}),
        num_rounds=int(settings["num-server-rounds"]),
        train_config=ConfigRecord({"lr": float(settings["lr"])}),
    )
