"""Where the gradients of parameters go: to a buffer, straight into the parameters, or aside until samples are weighed.

Letters: C clients, B samples, P entries of a client's vector, L tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedsim.engine.base import Batch
from fedsim.engine.factors import Factors, Number, Small
from fedsim.params import Layout


class Sink(Protocol):
    """Takes each parameter's gradient as a backward pass finds it; a shared parameter's in several parts.

    Attributes:
        by_sample: it asks for single samples only, so nobody need form their sum.
    """

    by_sample: bool

    def take(self, name: str, factors: Factors) -> None: ...


class GradientSink:
    """Writes gradients to views of a buffer; adds from the second use of a shared parameter on."""

    by_sample = False

    def __init__(self, views: Mapping[str, Tensor]) -> None:
        self.views = views
        self.seen: set[str] = set()

    def take(self, name: str, factors: Factors) -> None:
        if name in self.seen:
            factors.add_(self.views[name], 1.0)
        else:
            factors.write_(self.views[name])
            self.seen.add(name)


class SgdSink:
    """w <- w - step * gradient at once. Right only where each parameter is used once in the module."""

    by_sample = False

    def __init__(self, views: Mapping[str, Tensor], step: Number) -> None:
        self.views = views
        self.factor = -step

    def take(self, name: str, factors: Factors) -> None:
        factors.add_(self.views[name], self.factor)


class SampleSink:
    """Keeps factors until the norms of all samples' gradients are known, and then adds the samples up by weight.

    No second backward pass is made for it, since the gradients at a layer's outputs grow with their sample's weight.
    """

    by_sample = True

    def __init__(self) -> None:
        self.found: dict[str, Factors] = {}

    def take(self, name: str, factors: Factors) -> None:
        before = self.found.get(name)
        if before is not None:  # the gradients by a parameter that is used twice are formed and added
            both = before.formed() + factors.formed()
            factors = Small(lambda: both.sum(1), lambda: both)
        self.found[name] = factors

    def weighted_sum(self, layout: Layout, x: Tensor, batch: Batch, weigh: Callable[[Tensor], Tensor]) -> Tensor:
        """[C, P]; see `Session.weighted_sum`."""
        absent = x.new_zeros(batch.rows)
        # the pass was that of the mean loss, so gradients came divided by the number of samples
        count = absent.new_full((), absent.shape[1]) if batch.weights is None else batch.weights.sum(1).to(x)
        count = count.view(-1, 1, 1)
        names = layout.trainable.names
        norms = [self.found[name].square_norms() if name in self.found else absent for name in names]
        weights = weigh(torch.stack(norms, -1) * count.square()) * count
        total = x.new_zeros(x.shape)
        views = layout.views(total)
        for j, name in enumerate(names):
            if name in self.found:
                self.found[name].add_weighted_(views[name], weights[..., j])
        return total
