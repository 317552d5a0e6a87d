"""The table of selections: who takes part in a round, and how it is found out."""

from __future__ import annotations

from fedsim.strategies.selection.base import Among, Known, Selection
from fedsim.strategies.selection.chances import BySamples, Fixed, Uniform
from fedsim.strategies.selection.cyclic import Cyclic
from fedsim.strategies.selection.oort import Oort
from fedsim.strategies.selection.power_of_choice import PowerOfChoice

SELECTIONS: dict[str, type[Selection]] = {
    "uniform": Uniform,
    "by_samples": BySamples,
    "fixed": Fixed,
    "power_of_choice": PowerOfChoice,
    "oort": Oort,
    "cyclic": Cyclic,
}

__all__ = ["SELECTIONS", "Among", "Known", "Selection", "Uniform"]
