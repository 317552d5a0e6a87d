"""The table of strategies: one algorithm a file, listed here and nowhere else."""

from __future__ import annotations

from strategies.fedavg import FedAvg
from strategies.fedavg_m import FedAvgM
from strategies.fedavg_m_vr import FedAvgMVR
from strategies.scaffold import Scaffold
from strategies.scaffold_m import ScaffoldM
from strategies.scaffold_m_vr import ScaffoldMVR

STRATEGIES: dict[str, type] = {
    "fedavg": FedAvg,
    "scaffold": Scaffold,
    "fedavg_m": FedAvgM,
    "scaffold_m": ScaffoldM,
    "fedavg_m_vr": FedAvgMVR,
    "scaffold_m_vr": ScaffoldMVR,
}
