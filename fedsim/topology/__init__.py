"""Topologies of peers: which graph they have in each step, and the table of their names.

To add one: a frozen dataclass deriving from `Linked` with `pairs` or `Drawn` with `draw`, and a row below.
"""

from __future__ import annotations

from fedsim.topology.base import overview, spectral_gap
from fedsim.topology.drawn import ErdosRenyi, RandomRegular
from fedsim.topology.fixed import Complete, Edges, Exponential, Hypercube, Ring, Torus

TOPOLOGIES: dict[str, type] = {
    "complete": Complete,
    "ring": Ring,
    "torus": Torus,
    "hypercube": Hypercube,
    "exponential": Exponential,
    "random_regular": RandomRegular,
    "erdos_renyi": ErdosRenyi,
    "edges": Edges,
}

__all__ = ["TOPOLOGIES", "Complete", "overview", "spectral_gap"]
