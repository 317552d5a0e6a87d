"""Aggregation rules, robust and not, and what may come before them: the tables of their names.

To add one: a frozen dataclass that satisfies `Aggregator` (or `PreAggregator`), and a row below.
The contract suite then checks that it ignores the order of the rows, leaves its input alone and survives NaN.
"""

from __future__ import annotations

from fedsim.aggregate.base import PreAggregator
from fedsim.aggregate.centres import CenteredClipping, GeometricMedian, started
from fedsim.aggregate.coordinatewise import Bulyan, MeaMed, Median, Phocas, TrimmedMean
from fedsim.aggregate.mean import Mean
from fedsim.aggregate.neighbours import NNA, Krum, MultiKrum, nearest_neighbour_average
from fedsim.aggregate.prepare import ARC, NNM, Bucketing, Clipping, prepared
from fedsim.aggregate.subsets import CAF, MDA, MVA, SMEA
from fedsim.fleet import Aggregator, TooFewRows

AGGREGATORS: dict[str, type] = {
    "mean": Mean,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "geometric_median": GeometricMedian,
    "centered_clipping": CenteredClipping,
    "nna": NNA,
    "mda": MDA,
    "mva": MVA,
    "meamed": MeaMed,
    "phocas": Phocas,
    "caf": CAF,
    "smea": SMEA,
    "bulyan": Bulyan,
}

PRE_AGGREGATORS: dict[str, type] = {"nnm": NNM, "bucketing": Bucketing, "clipping": Clipping, "arc": ARC}

__all__ = [
    "AGGREGATORS",
    "PRE_AGGREGATORS",
    "Aggregator",
    "CenteredClipping",
    "Mean",
    "PreAggregator",
    "TooFewRows",
    "nearest_neighbour_average",
    "prepared",
    "started",
]
