"""Ways to run one step, behind one interface; `auto` takes the first that suits.

compiled   one pass of C++ on a CPU (`emitted`), torch.compile on a GPU (`inductor`)
fused      torch's own kernel
eager      operation by operation; takes every step
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fedsim.optim.backends.eager import Eager
from fedsim.optim.backends.emitted import Emitted
from fedsim.optim.backends.fused import Fused
from fedsim.optim.backends.inductor import Inductor
from fedsim.optim.groups import Recipe
from fedsim.optim.step import Block


class Backend(Protocol):
    """One way to run a step.

    Attributes:
        name: as in `optimizer.backend`.
        automatic: whether `auto` may take it.
    """

    name: str
    automatic: bool

    def suits(self, recipe: Recipe, x: Tensor, block: Block) -> bool:
        """Whether it can take this step of x [k, P]; a rule on recipe, sizes, device and compiler, never a timing."""
        ...

    def step(self, recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> list[int]:
        """One step of every row of x [k, P] in place; returns the rows left out, whose gradients are not finite."""
        ...


EMITTED, FUSED, INDUCTOR, EAGER = Emitted(), Fused(), Inductor(), Eager()
BACKENDS: tuple[Backend, ...] = (EMITTED, FUSED, INDUCTOR, EAGER)
"""In the order of their speed."""


def choose_backend(recipe: Recipe, x: Tensor, block: Block) -> Backend:
    """The back end of this step: the first that suits among all, or among those of the name that was asked for."""
    how = recipe.settings.backend
    for backend in BACKENDS:
        wanted = backend.automatic if how == "auto" else backend.name == how
        if wanted and backend.suits(recipe, x, block):
            return backend
    return EAGER
