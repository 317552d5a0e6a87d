"""The table of strategies: one algorithm a file, listed here and nowhere else."""

from __future__ import annotations

from strategies.async_fedavg import AsyncFedAvg
from strategies.dsgd import DSGD
from strategies.extragradient import Extragradient
from strategies.fedavg import FedAvg
from strategies.fedavg_m import FedAvgM
from strategies.fedavg_m_vr import FedAvgMVR
from strategies.fedbuff import FedBuff
from strategies.fedbuff_stream import FedBuffStream
from strategies.fedfix import FedFix
from strategies.masha1 import Masha1
from strategies.masha2 import Masha2
from strategies.monna import Monna
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
    "async_fedavg": AsyncFedAvg,
    "fedfix": FedFix,
    "fedbuff": FedBuff,
    "fedbuff_stream": FedBuffStream,
    "dsgd": DSGD,
    "monna": Monna,
    "extragradient": Extragradient,
    "masha1": Masha1,
    "masha2": Masha2,
}
