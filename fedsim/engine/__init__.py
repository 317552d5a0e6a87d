"""Gradients of a stack of clients: engines, and the rule that chooses one."""

from fedsim.engine.base import Batch, Engine, Session
from fedsim.engine.build import ENGINES, build_engine
from fedsim.engine.choose import Plan, choose

__all__ = ["ENGINES", "Batch", "Engine", "Plan", "Session", "build_engine", "choose"]
