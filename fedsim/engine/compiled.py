"""The compiled engine: torch.compile of the vmapped gradient.

Compilation takes seconds for every shape of stack and batch, in every thread; it pays in long runs of few shapes.

Letters: C clients in the stack, B samples of a minibatch, P entries of a client's vector.
"""

from __future__ import annotations

import threading

from torch import Tensor, nn

from fedsim.engine.base import Batch
from fedsim.engine.losses import Loss
from fedsim.engine.protocol import Engine
from fedsim.engine.stacked import StackedEngine
from fedsim.engine.vmapped import Vmapped, warn_of_change
from fedsim.params import Layout
from fedsim.task import PlainSession, Session
from fedsim.trees import Tree


class CompiledEngine(Engine):
    """torch.compile of the vmapped gradient, for long runs of few shapes.

    Where compilation fails the stacked engine takes over, with one warning.
    """

    name = "compiled"

    def __init__(self, module: nn.Module, layout: Layout, loss: Loss, precision: str = "fp32") -> None:
        self.layout = layout
        self.program = Vmapped(module, layout, loss, precision, compiled=True)
        self.stacked = StackedEngine(module, layout, loss, precision)
        self.failed = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        stacked = self.stacked
        return CompiledEngine, (stacked.module, stacked.layout, stacked.loss, stacked.precision)

    def session(self, x: Tensor) -> Session:
        return self.stacked.session(x) if self.failed else PlainSession(self._gradient, x)

    def logits(self, x: Tensor, inputs: Tree) -> Tensor:
        return self.stacked.logits(x, inputs)

    def _gradient(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.failed:
            return self.stacked.session(x).gradient(batch)
        result, error = self.program.gradient_or(lambda: self.stacked.session(x).gradient(batch), x, batch)
        if error is not None:
            with self._lock:
                if not self.failed:
                    what = "cannot be compiled and runs in the stacked engine"
                    warn_of_change(self.stacked.module, what, error)
                self.failed = True
        return result
