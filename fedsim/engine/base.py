"""The minibatch of a stack of clients.

Letters: C clients in the stack, B samples of a minibatch (padded to the largest), T positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsim.streams import Streams
from fedsim.trees import Tree, one


@dataclass(frozen=True)
class Batch:
    """One minibatch for every client of a stack.

    Args:
        inputs: [C, B, ...], or a dictionary of such tensors, which a module gets as keyword arguments.
        targets: [C, B] class indices, or [C, B, ...] of whatever the loss takes; a dictionary too.
        weights: [C, B], 1 for a sample and 0 for padding; None when no row is padded. Padding stands behind the
            samples, so that a sample's keyed noise does not depend on how far its batch was padded. A client whose
            weights are all zero has loss 0 and gradient 0, and its buffers stay as they are.
        streams: of the stack, for dropout and other noise.
        step: the local step, part of the key of that noise.
        counts: [C] on the host, how many rows of each client are samples; None where nobody has counted padded ones.
    """

    inputs: Tree
    targets: Tree
    weights: Tensor | None = None
    streams: Streams | None = None
    step: int = 0
    counts: Sequence[int] | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """(C, B)."""
        shape = one(self.targets).shape
        return shape[0], shape[1]
