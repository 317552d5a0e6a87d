"""One step on a block of rows: the order of section "a step" for every rule, written once.

L2 decay, gradient transforms, the rule's state and direction, decay, the step, decay modes that come after it, the
weight average. Every back end but torch's own kernels runs this function, eagerly or compiled.

Letters: k clients, P coordinates of the trainable vector, p those of one group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedsim.optim.groups import ParamGroup, Recipe, Values
from fedsim.optim.rule import Named
from fedsim.optim.transforms import transform


@dataclass
class Block:
    """Everything one step needs about some rows.

    Args:
        shared: average, average_rate and average_first, where present.
        states: per group, its states and inputs, and its weights where the step runs on vectors of them.
        coefs: per group, its coefficients.
        doubt: see `Optimizer.step_`.
    """

    shared: Values
    states: list[Values]
    coefs: list[Values]
    doubt: Tensor | None = None

    def map(self, change: Callable[[Values], Values]) -> Block:
        """The block with all its values changed."""
        return Block(change(self.shared), [change(v) for v in self.states], [change(v) for v in self.coefs])


def step_block_(recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> None:
    """One step of every row of x [k, P], in place, with gradients g [k, P]."""
    if "average_first" in block.shared:  # the average starts at the point the client starts from
        average = block.shared["average"]
        average.lerp_(x, block.shared["average_first"])
    g = _gradient(recipe, x, g, block)
    for group, states, coefs in zip(recipe.groups, block.states, block.coefs, strict=True):
        s, c = Named(states), Named(coefs)
        if group.columns is None:
            _advance_(group, x, g, s, c)
            continue
        own = x.index_select(1, states["columns"])
        _advance_(group, own, g.index_select(1, s.columns), s, c)
        x.index_copy_(1, s.columns, own)
    if "average" in block.shared:
        block.shared["average"].lerp_(x, block.shared["average_rate"])


def _gradient(recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> Tensor:
    """The gradient that the rules see: l2 decay, transforms."""
    for group, states, coefs in zip(recipe.groups, block.states, block.coefs, strict=True):
        if group.mode == "l2":
            weights = states["l2_weights"]
            g = g + x * coefs["decay_rate"] if weights is None else g + x * (weights * coefs["decay_rate"])
    return transform(x, g, recipe.segments, recipe.settings)


def _advance_(group: ParamGroup, x: Tensor, g: Tensor, s: Named, c: Named) -> None:
    """State, direction, decay and step of one group on its own coordinates."""
    rule, mode = group.rule, group.mode
    lr_weights, decay_weights = s.lr_weights, s.decay_weights
    lr = c.lr
    if rule.owns_lr and lr_weights is not None:
        c.lr = lr * lr_weights
    if rule.decay == "in_update":
        rate = c.decay_rate if mode == "in_update" else 0.0
        c.decay = rate if decay_weights is None else rate * decay_weights
    if group.storage is not None:
        group.storage.decode_(s, x)
    u = rule.direction(x, g, s, c, group.segments)
    if group.storage is not None:
        group.storage.encode_(s)
    if mode in ("decoupled", "independent"):
        shrink_(x, c.decay_rate, decay_weights)
    if rule.owns_lr:
        x.sub_(u)
    else:
        _descend_(x, u if lr_weights is None else u * lr_weights, lr)
    if mode == "decoupled_after":
        shrink_(x, c.decay_rate, decay_weights)
    elif mode == "prox":
        x.div_(1 + (c.decay_rate if decay_weights is None else c.decay_rate * decay_weights))


def shrink_(x: Tensor, rate: Tensor | float, weights: Tensor | None) -> None:
    """x *= 1 - rate * weights."""
    if weights is None:
        x.mul_(1 - rate)
    elif isinstance(rate, Tensor):
        x.sub_(x * weights * rate)
    else:
        x.addcmul_(x, weights, value=-rate)


def _descend_(x: Tensor, u: Tensor, lr: Tensor | float) -> None:
    """x -= lr * u."""
    if isinstance(lr, Tensor):
        x.sub_(u * lr)
    else:
        x.add_(u, alpha=-lr)
