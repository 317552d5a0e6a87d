"""The table of strategies: one algorithm a file, listed here and nowhere else."""

from __future__ import annotations

from strategies.fedavg import FedAvg

STRATEGIES: dict[str, type] = {
    "fedavg": FedAvg,
}
