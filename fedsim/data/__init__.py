"""Data sources, and how their samples are given to clients."""

from fedsim.data.arrays import from_arrays, next_tokens
from fedsim.data.build import build, split
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.data.partition import PARTITIONS
from fedsim.data.sources import DATASETS, load

__all__ = ["DATASETS", "PARTITIONS", "Dataset", "FederatedData", "build", "from_arrays", "load", "next_tokens", "split"]
