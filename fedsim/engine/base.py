"""What an engine is: gradients of a stack of clients.

Letters: C clients in the stack, B samples of a minibatch (padded to the largest), P entries of a client's vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedsim.streams import Streams
from fedsim.task import Session


@dataclass(frozen=True)
class Batch:
    """One minibatch for every client of a stack.

    Args:
        inputs: [C, B, ...].
        targets: [C, B] class indices, or [C, B, T] for sequences.
        weights: [C, B], 1 for a sample and 0 for padding; None when no row is padded. Padding stands behind the
            samples, so that a sample's keyed noise does not depend on how far its batch was padded. A client whose
            weights are all zero has loss 0 and gradient 0, and its buffers stay as they are.
        streams: of the stack, for dropout and other noise.
        step: the local step, part of the key of that noise.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None
    streams: Streams | None = None
    step: int = 0


class Engine(Protocol):
    """Computes what a stack of clients needs, each row from its own parameters and its own minibatch.

    One engine may be used by several threads at once, each with its own stack.
    """

    name: str

    def gradient(self, x: Tensor, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradient of each client's mean loss, in training mode.

        Args:
            x: [C, P]; rows may have any stride, entries of a row lie side by side. Entries of buffers (the tail
                beyond `layout.num_trainable`) are updated in place, as a module in training mode would.
            batch: of the same C clients.
            out: [C, P] to write the gradient to; its buffer entries are set to zero.

        Returns:
            (gradient [C, P], loss [C]): weighted means over each client's own samples.
        """
        ...

    def sgd_step_(
        self,
        x: Tensor,
        batch: Batch,
        lr: float,
        *,
        scale: float = 1.0,
        shift: Tensor | None = None,
        grad_sum: Tensor | None = None,
    ) -> Tensor | None:
        """One step x <- x - lr * (scale * g + shift) in place, fused into the backward products where the engine can.

        Equal to `gradient` and then the update, up to float rounding. After K steps of one lr the sum of the raw
        gradients is also ((x_0 - x_K) / lr - K * shift) / scale: that costs nothing on the way, `grad_sum` does.

        Args:
            x: [C, P], changed in place.
            batch: of the same C clients.
            lr: the learning rate.
            scale: of the gradient.
            shift: [P] or [C, P], added to the scaled gradient; its entries for buffers are ignored.
            grad_sum: [C, P]; the raw gradient g is added to it.

        Returns:
            loss [C] before the step, or None if this engine does not fuse (then nothing was touched).
        """
        ...

    def session(self, x: Tensor) -> Session:
        """The same engine bound to one stack, so that K steps prepare their views of x [C, P] only once."""
        ...

    def logits(self, x: Tensor, inputs: Tensor) -> Tensor:
        """The model's outputs in evaluation mode: x [P] with inputs [B, ...], or x [C, P] with inputs [C, B, ...]."""
        ...


@dataclass(frozen=True)
class PlainSession:
    """The session of an engine that has nothing to prepare."""

    engine: Engine
    x: Tensor

    def gradient(self, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.engine.gradient(self.x, batch, out)

    def sgd_step_(
        self,
        batch: Batch,
        lr: float,
        *,
        scale: float = 1.0,
        shift: Tensor | None = None,
        grad_sum: Tensor | None = None,
    ) -> Tensor | None:
        return self.engine.sgd_step_(self.x, batch, lr, scale=scale, shift=shift, grad_sum=grad_sum)
