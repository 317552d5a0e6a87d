"""What an engine is: gradients of a stack of clients.

Letters: C clients in the stack, B samples of a minibatch (padded to the largest), P entries of a client's vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedsim.streams import Streams


@dataclass(frozen=True)
class Batch:
    """One minibatch for every client of a stack.

    Args:
        inputs: [C, B, ...].
        targets: [C, B] class indices, or [C, B, T] for sequences.
        weights: [C, B], 1 for a sample and 0 for padding; None when no row is padded.
        streams: of the stack, for dropout and other noise.
        step: the local step, part of the key of that noise.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None
    streams: Streams | None = None
    step: int = 0


class Engine(Protocol):
    """Computes what a stack of clients needs, each row from its own parameters and its own minibatch."""

    name: str

    def gradient(self, x: Tensor, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradient of each client's mean loss, in training mode.

        Args:
            x: [C, P]; rows may have any stride. Entries of buffers (the tail beyond `layout.num_trainable`) are
                updated in place, as a module in training mode would.
            batch: of the same C clients.
            out: [C, P] to write the gradient to; its buffer entries are set to zero.

        Returns:
            (gradient [C, P], loss [C]): weighted means over each client's own samples.
        """
        ...

    def sgd_step_(self, x: Tensor, batch: Batch, lr: float) -> Tensor | None:
        """One step of plain SGD in place, fused into the backward products where the engine can.

        Returns:
            loss [C] before the step, or None if this engine does not fuse (then x is untouched).
        """
        ...

    def logits(self, x: Tensor, inputs: Tensor) -> Tensor:
        """The model's outputs in evaluation mode: x [P] with inputs [B, ...], or x [C, P] with inputs [C, B, ...]."""
        ...
