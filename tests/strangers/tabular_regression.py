"""House prices in towns: a data frame with a column for the town; some towns have only houses to predict."""

import numpy as np
import pandas as pd

import fedsim
from fedsim.data import Dataset, from_table


def houses(seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    n = 400
    frame = pd.DataFrame({"area": rng.uniform(0.4, 2, n), "rooms": rng.uniform(1, 7, n), "age": rng.uniform(0, 1, n)})
    frame["town"] = [f"town {k:02d}" for k in (rng.power(2, n) * 12).astype(int)]
    frame["price"] = 2 * frame.area + 0.3 * frame.rooms - frame.age + 0.1 * rng.normal(size=n)
    sold = rng.random(n) < 0.8
    sold[frame.town == "town 03"] = False  # nothing to learn from there
    frame[["area", "rooms", "age"]] -= frame[["area", "rooms", "age"]].mean()
    return from_table(frame[sold], "price", client="town", test=frame[~sold])


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 15,
            "task": {
                "name": "regression",
                "dataset": f"{__name__}:houses",
                "model": {"name": "mlp", "hidden": [16]},
                "loss": {"name": "huber", "delta": 1.0},
                "metrics": ["mae", "r2"],
            },
            "partition": "natural",
            "strategy": "scaffold",
            "evaluate": {"every": 15},
            "local": {"epochs": 2, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.1}},
        }
    )
