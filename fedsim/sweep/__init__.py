"""Sweeps: an experiment file run with many settings and seeds, side by side, and what came out."""

from fedsim.sweep.drive import Stopped, Watch, play
from fedsim.sweep.plan import Sweep, whole_number, whole_numbers
from fedsim.sweep.results import Results
from fedsim.sweep.space import Choice, Range, Space, parse_space

__all__ = [
    "Choice",
    "Range",
    "Results",
    "Space",
    "Stopped",
    "Sweep",
    "Watch",
    "parse_space",
    "play",
    "whole_number",
    "whole_numbers",
]
