"""The composition root: an experiment file becomes a task, a fleet and a strategy that fit together.

This room is the one place that knows every table. Everything it builds can be built by hand in the same way; see
docs/tutorial/. Its files, from the top down:

    root      `compose`: the file from its first section to its last, and the `Composition` that it becomes
    sections  what each section may hold
    entries   table entries inside a section: data sets, models, devices, optimizers, compressors, ...
    problems  what the task is: a formula, or data and a module that wait for an engine
    work      what clients will do, asked of the strategy that will run; the plan in words
    fleets    devices, links, byzantine clients and the executor: what the simulated fleet is made of
    refusals  which parts do not go together, and why
    tables    every table by the name that `fedsim list` gives it
"""

from fedsim.compose.entries import shared_fields
from fedsim.compose.root import Composition, compose
from fedsim.compose.tables import TABLES

__all__ = ["TABLES", "Composition", "compose", "shared_fields"]
