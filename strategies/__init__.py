"""The table of strategies: one algorithm a file, listed here and nowhere else."""

from __future__ import annotations

from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.centralised import Centralised
from fedsim.strategies.dsgd import DSGD
from fedsim.strategies.extragradient import Extragradient
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedbuff_stream import FedBuffStream
from fedsim.strategies.fedfix import FedFix
from fedsim.strategies.masha1 import Masha1
from fedsim.strategies.masha2 import Masha2
from fedsim.strategies.mb_storm import MBStorm
from fedsim.strategies.mime import Mime
from fedsim.strategies.mime_lite import MimeLite
from fedsim.strategies.monna import Monna
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.scaffold_m import ScaffoldM
from fedsim.strategies.scaffold_m_vr import ScaffoldMVR
from fedsim.strategies.stem import Stem
from fedsim.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "centralised": Centralised,
    "fedavg": FedAvg,
    "scaffold": Scaffold,
    "fedavg_m": FedAvgM,
    "scaffold_m": ScaffoldM,
    "fedavg_m_vr": FedAvgMVR,
    "scaffold_m_vr": ScaffoldMVR,
    "mime": Mime,
    "mime_lite": MimeLite,
    "stem": Stem,
    "mb_storm": MBStorm,
    "async_fedavg": AsyncFedAvg,
    "fedasync": FedAsync,
    "fedfix": FedFix,
    "fedbuff": FedBuff,
    "fedbuff_stream": FedBuffStream,
    "dsgd": DSGD,
    "monna": Monna,
    "extragradient": Extragradient,
    "masha1": Masha1,
    "masha2": Masha2,
}
