"""Where the gradients of parameters go: to a buffer, or straight into the parameters as a step of SGD.

Letters: C clients, [*] the shape of a parameter, with a client axis in front when C > 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Sink(Protocol):
    """Takes each parameter's gradient as a backward pass finds it."""

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """A matrix's gradient is left @ right."""
        ...

    def tensor(self, name: str, grad: Tensor) -> None:
        """A parameter's gradient is `grad`."""
        ...


class GradientSink:
    """Writes gradients to views of a buffer; adds from the second use of a shared parameter on."""

    def __init__(self, views: Mapping[str, Tensor]) -> None:
        self.views = views
        self.seen: set[str] = set()

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        view = self.views[name]
        if name in self.seen:
            view += torch.matmul(left, right)
        elif view.ndim == 3:
            torch.bmm(left, right, out=view)
        else:
            torch.mm(left, right, out=view)
        self.seen.add(name)

    def tensor(self, name: str, grad: Tensor) -> None:
        view = self.views[name]
        if name in self.seen:
            view += grad
        else:
            view.copy_(grad)
        self.seen.add(name)


class SgdSink:
    """w <- w - step * gradient at once. Right only where each parameter is used once in the module."""

    def __init__(self, views: Mapping[str, Tensor], step: float) -> None:
        self.views = views
        self.step = step

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        view = self.views[name]
        if view.ndim == 3:
            view.baddbmm_(left, right, alpha=-self.step)
        else:
            view.addmm_(left, right, alpha=-self.step)

    def tensor(self, name: str, grad: Tensor) -> None:
        self.views[name].sub_(grad, alpha=self.step)
