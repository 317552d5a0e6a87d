"""fedsim: federated learning on stacks of clients.

    import fedsim
    history = fedsim.run("configs/quickstart.yaml", rounds=20)
    history.plot("test_accuracy", x="bits_up")

The pieces are importable on their own as well, `fedsim.compose.compose` among them, which builds what an experiment
file describes; see docs/tutorial/python.md. Names are loaded when first used, so that `import fedsim` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedsim.cohort import Cohort as Cohort
    from fedsim.config import ConfigError as ConfigError
    from fedsim.data import Dataset as Dataset
    from fedsim.data import FederatedData as FederatedData
    from fedsim.fleet import Cost as Cost
    from fedsim.fleet import Fleet as Fleet
    from fedsim.fleet import Replies as Replies
    from fedsim.fleet import choose as choose
    from fedsim.history import History as History
    from fedsim.runs import Simulation as Simulation
    from fedsim.runs import run as run
    from fedsim.runs import simulate as simulate
    from fedsim.sim.fleet import SimFleet as SimFleet
    from fedsim.strategy import Strategy as Strategy
    from fedsim.strategy import Traits as Traits
    from fedsim.task import Task as Task
    from fedsim.tasks.quadratic import QuadraticTask as QuadraticTask

_PLACES = {
    "Cohort": "fedsim.cohort",
    "ConfigError": "fedsim.config",
    "Cost": "fedsim.fleet",
    "Dataset": "fedsim.data",
    "FederatedData": "fedsim.data",
    "Fleet": "fedsim.fleet",
    "History": "fedsim.history",
    "QuadraticTask": "fedsim.tasks.quadratic",
    "Replies": "fedsim.fleet",
    "SimFleet": "fedsim.sim.fleet",
    "Simulation": "fedsim.runs",
    "Strategy": "fedsim.strategy",
    "Traits": "fedsim.strategy",
    "Task": "fedsim.task",
    "choose": "fedsim.fleet",
    "run": "fedsim.runs",
    "simulate": "fedsim.runs",
}

__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
