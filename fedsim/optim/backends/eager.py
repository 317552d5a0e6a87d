"""A step run operation by operation: takes every step, on every device.

It is a dozen passes over its arrays. On a CPU it is cut into blocks whose arrays and temporaries stay in the core's
cache, which makes it several times faster for long vectors; on a GPU the whole stack is one block, so the number of
launches does not grow with clients.
"""

from __future__ import annotations

from torch import Tensor

from fedsim.optim.backends.rows import by_rows
from fedsim.optim.groups import Recipe, Values
from fedsim.optim.step import Block, step_block_

_ENTRIES = 1 << 17  # of one array in a block


class Eager:
    """The back end that the others fall back on."""

    name, automatic = "eager", True

    def suits(self, recipe: Recipe, x: Tensor, block: Block) -> bool:
        """Always."""
        return True

    def step(self, recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> list[int]:
        """One step of all rows; returns those left out."""
        return by_rows(recipe, x, g, block, _ENTRIES, lambda x, g, b: _in_pieces(recipe, x, g, b))


def _in_pieces(recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> None:
    width = x.shape[1]
    if not recipe.alone or x.device.type != "cpu" or width <= _ENTRIES:
        step_block_(recipe, x, g, block)
        return
    for i in range(0, width, _ENTRIES):
        columns = slice(i, min(i + _ENTRIES, width))

        def pick(values: Values, columns: slice = columns) -> Values:
            return {
                n: v[:, columns] if isinstance(v, Tensor) and v.ndim == 2 and v.shape[1] == width else v
                for n, v in values.items()
            }

        step_block_(recipe, x[:, columns], g[:, columns], block.map(pick))
