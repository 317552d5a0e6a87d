"""The table of strategies: one algorithm a file, listed here and nowhere else."""

from __future__ import annotations

from fedsim.strategies.apfl import APFL
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.bridge import Bridge
from fedsim.strategies.centralised import Centralised
from fedsim.strategies.clipped_gossip import ClippedGossip
from fedsim.strategies.diana import Diana
from fedsim.strategies.ditto import Ditto
from fedsim.strategies.dsgd import DSGD
from fedsim.strategies.ef21 import EF21
from fedsim.strategies.ef21_bc import EF21BC
from fedsim.strategies.extragradient import Extragradient
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.fedbn import FedBN
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedbuff_stream import FedBuffStream
from fedsim.strategies.fedcm import FedCM
from fedsim.strategies.feddyn import FedDyn
from fedsim.strategies.fedfix import FedFix
from fedsim.strategies.fednova import FedNova
from fedsim.strategies.fedper import FedPer
from fedsim.strategies.fedprox import FedProx
from fedsim.strategies.fedrep import FedRep
from fedsim.strategies.gradient_coding import GradientCoding
from fedsim.strategies.gradient_tracking import GradientTracking
from fedsim.strategies.m_sgc import MSGC
from fedsim.strategies.marina import Marina
from fedsim.strategies.masha1 import Masha1
from fedsim.strategies.masha2 import Masha2
from fedsim.strategies.mb_storm import MBStorm
from fedsim.strategies.mime import Mime
from fedsim.strategies.mime_lite import MimeLite
from fedsim.strategies.monna import Monna
from fedsim.strategies.optimistic_gradient import OptimisticGradient
from fedsim.strategies.pfedme import PFedMe
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.scaffold_m import ScaffoldM
from fedsim.strategies.scaffold_m_vr import ScaffoldMVR
from fedsim.strategies.sr_sgc import SRSGC
from fedsim.strategies.stem import Stem
from fedsim.strategies.uncoded import Uncoded
from fedsim.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "centralised": Centralised,
    "fedavg": FedAvg,
    "scaffold": Scaffold,
    "fedavg_m": FedAvgM,
    "scaffold_m": ScaffoldM,
    "fedavg_m_vr": FedAvgMVR,
    "scaffold_m_vr": ScaffoldMVR,
    "fedbn": FedBN,
    "fedper": FedPer,
    "mime": Mime,
    "mime_lite": MimeLite,
    "fedrep": FedRep,
    "ditto": Ditto,
    "pfedme": PFedMe,
    "apfl": APFL,
    "fedcm": FedCM,
    "fedprox": FedProx,
    "feddyn": FedDyn,
    "fednova": FedNova,
    "stem": Stem,
    "mb_storm": MBStorm,
    "async_fedavg": AsyncFedAvg,
    "fedasync": FedAsync,
    "fedfix": FedFix,
    "fedbuff": FedBuff,
    "fedbuff_stream": FedBuffStream,
    "dsgd": DSGD,
    "gradient_tracking": GradientTracking,
    "monna": Monna,
    "ef21": EF21,
    "ef21_bc": EF21BC,
    "diana": Diana,
    "marina": Marina,
    "clipped_gossip": ClippedGossip,
    "bridge": Bridge,
    "extragradient": Extragradient,
    "optimistic_gradient": OptimisticGradient,
    "masha1": Masha1,
    "masha2": Masha2,
    "uncoded": Uncoded,
    "gradient_coding": GradientCoding,
    "sr_sgc": SRSGC,
    "m_sgc": MSGC,
}
