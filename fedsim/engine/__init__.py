"""Gradients of a stack of clients: engines, and the rule that chooses one."""

from fedsim.engine.base import Batch
from fedsim.engine.build import ENGINES, build_engine
from fedsim.engine.choose import Plan, choose_engine
from fedsim.engine.protocol import Engine

__all__ = ["ENGINES", "Batch", "Engine", "Plan", "build_engine", "choose_engine"]
