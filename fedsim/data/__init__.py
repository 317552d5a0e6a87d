"""Data sources, and how their samples are given to clients."""

from fedsim.data.arrays import from_arrays, next_tokens
from fedsim.data.build import build, split
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.data.partition import PARTITIONS
from fedsim.data.sources import DATASETS, load
from fedsim.data.tables import from_samples, from_table

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "Dataset",
    "FederatedData",
    "build",
    "from_arrays",
    "from_samples",
    "from_table",
    "load",
    "next_tokens",
    "split",
]
