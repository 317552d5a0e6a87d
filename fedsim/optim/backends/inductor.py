"""A step as one function compiled by torch (Inductor): the compiled form of a GPU.

On a CPU it is never taken: on the stacks of the benchmark it is 1.5 to 13 times slower than the emitted loop, since its
guards and wrappers cost more than a small step and its loops look coefficients up again for every coordinate, and a
rule with norms per tensor takes half a minute to compile for at most 1.5 times the eager step's speed. It compiles for
several seconds a rule, so `auto` leaves it to those who name it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.optim.backends.rows import by_rows, take_rows
from fedsim.optim.groups import Recipe, Values
from fedsim.optim.step import Block, step_block_


class Inductor:
    """`backend: compiled` on a GPU."""

    name, automatic = "compiled", False

    def suits(self, recipe: Recipe, x: Tensor, block: Block) -> bool:
        """Steps of whole arrays; the host decides what a step on matrices does."""
        return x.is_cuda and all(group.rule.reach != "matrix" for group in recipe.groups)

    def step(self, recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> list[int]:
        """One step of all rows; returns those left out."""
        return by_rows(recipe, x, g, block, 1 << 20, lambda x, g, b: _compiled(recipe, x, g, b)(x, g, b))


def _compiled(recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> Callable[[Tensor, Tensor, Block], None]:
    """The step of a recipe as one compiled function, whatever the number of rows."""
    if "inductor" not in recipe.compiled:
        _rehearse(recipe, x, g, block)

        def step(x: Tensor, g: Tensor, shared: Values, states: list[Values], coefs: list[Values]) -> None:
            step_block_(recipe, x, g, Block(shared, states, coefs))

        # torch counts versions per code object, which all recipes share
        compiled = torch.compile(step, dynamic=True, fullgraph=True, isolate_recompiles=True)  # type: ignore[call-overload]
        recipe.compiled["inductor"] = lambda x, g, b: compiled(
            x, g, _tensors(b.shared, x), b.states, [_tensors(c, x) for c in b.coefs]
        )
    found: Callable[[Tensor, Tensor, Block], None] = recipe.compiled["inductor"]
    return found


def _tensors(values: Values, x: Tensor) -> Values:
    """Numbers as tensors [k, 1], in one transfer; as numbers they would be compiled in."""
    numbers = {n: v for n, v in values.items() if not isinstance(v, Tensor)}
    if not numbers:
        return values
    column = torch.tensor(list(numbers.values()), dtype=torch.float64).to(x.dtype).to(x.device)
    return {**values, **dict(zip(numbers, column[:, None, None].expand(-1, len(x), 1).unbind(0), strict=True))}


def _rehearse(recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> None:
    """An eager step on a copy of one row, so that segments' constants exist before the step is traced."""
    one = take_rows(block, slice(0, 1), len(x))
    copy = one.map(lambda values: {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()})
    step_block_(recipe, x[:1].clone(), g[:1], copy)
