"""What an engine is: gradients of a stack of clients.

Letters: C clients in the stack, B samples of a minibatch, P entries of a client's vector.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fedsim.engine.low_rank import Chain
from fedsim.task import Session
from fedsim.trees import Tree


class Engine(Protocol):
    """Computes what a stack of clients needs, each row from its own parameters and its own minibatch.

    One engine may be used by several threads at once, each with its own stack.

    Attributes:
        name: its row of `ENGINES`.
        chain: the layers of a module whose local runs may be taken in factors (`low_rank_run`), else None.
    """

    name: str
    chain: Chain | None = None

    def session(self, x: Tensor) -> Session:
        """The engine bound to one stack x [C, P], so that K steps prepare their views of it only once.

        Rows of x may have any stride, entries of a row lie side by side. Batches are `Batch`es of the same C clients.
        A gradient is that of each client's mean loss, in training mode: entries of buffers (the tail of x beyond
        `layout.num_trainable`) are updated in place, as a module would, and those of the gradient are zero.
        """
        ...

    def logits(self, x: Tensor, inputs: Tree) -> Tensor:
        """The outputs in evaluation mode of the model x [P] for inputs [B, ...]."""
        ...

    def reads_only(self, sample: Tree) -> bool:
        """Whether samples like this one [...] may be handed over as a view of the data set: nobody writes to them."""
        return False
