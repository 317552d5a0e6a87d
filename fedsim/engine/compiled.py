"""The compiled engine: torch.compile of the vmapped gradient.

Compilation takes seconds for every shape of stack and batch, in every thread; it pays in long runs of few shapes.

Letters: C clients in the stack, B samples of a minibatch, P entries of a client's vector.
"""

from __future__ import annotations

import threading
import warnings

from torch import Tensor, nn

from fedsim.engine.base import Batch
from fedsim.engine.losses import Loss
from fedsim.engine.protocol import Engine
from fedsim.engine.stacked import StackedEngine
from fedsim.engine.vmapped import Vmapped
from fedsim.params import Layout
from fedsim.task import PlainSession, Session


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

    def logits(self, x: Tensor, inputs: Tensor) -> Tensor:
        return self.stacked.logits(x, inputs)

    def _gradient(self, x: Tensor, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.failed:
            return self.stacked.session(x).gradient(batch, out)
        tail = x[:, self.layout.num_trainable :]
        before = tail.clone()
        try:
            return self.program.gradient(x, batch, out)
        except Exception as error:  # the compiler may fail on a user's module in any way
            tail.copy_(before)
            result = self.stacked.session(x).gradient(batch, out)
            with self._lock:
                if not self.failed:
                    self._warn(error)
                self.failed = True
            return result

    def _warn(self, error: Exception) -> None:
        module = type(self.stacked.module).__name__
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"{module} cannot be compiled and runs in the stacked engine: "
            f"{type(error).__name__}: {reason[0] if reason else ''}",
            stacklevel=4,
        )
