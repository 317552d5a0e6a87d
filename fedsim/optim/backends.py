"""How a step runs: eagerly in cache-sized blocks, through torch's fused kernels, or as one function compiled by torch.

An eager step is a dozen passes over its arrays. On a CPU it is cut into blocks whose arrays and temporaries stay in
the core's cache, which makes it several times faster for long vectors; on a GPU the whole stack is one block, so the
number of launches does not grow with clients. Torch's fused kernels are private: when a call to one does not fit this
version of torch, the eager formula answers.

Letters: k clients, P coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedsim.optim.fused import fused_step_, kernel_for
from fedsim.optim.pipeline import Block, Plan, Values, step_block_

# Entries of one array in a block, by back end, on a CPU. Eager steps have temporaries that should stay in the cache;
# one pass has none, but the gradient should be near still after its finite check.
_EAGER_ENTRIES = 1 << 17
_DECODED_ENTRIES = 1 << 26  # on a GPU: 256 MB
_ENTRIES = {"eager": _EAGER_ENTRIES, "fused": 1 << 20, "compiled": 1 << 20}


def choose(plan: Plan, x: Tensor, block: Block) -> str:
    """The back end of this step: `auto` takes torch's kernel where it does exactly what is asked."""
    how = plan.settings.backend
    if how in ("eager", "compiled"):
        return how
    fits = plan.fuses and not block.shared and not any(isinstance(v, Tensor) for v in block.coefs[0].values())
    return "fused" if fits and kernel_for(plan.parts[0].rule, x.device.type, x.dtype) is not None else "eager"


def row_blocks(x: Tensor, how: str, decodes: bool = False) -> list[slice]:
    """The rows that are worked on together; `decodes` bounds the room of decoded states where all rows would be."""
    k, width = x.shape
    if x.device.type == "cpu":
        step = max(1, _ENTRIES[how] // width)
    else:
        step = max(1, _DECODED_ENTRIES // width) if decodes else k
    return [slice(i, min(i + step, k)) for i in range(0, k, step)]


def take_rows(block: Block, rows: slice, k: int) -> Block:
    """The part of a block that belongs to some of its k rows."""
    if rows.start == 0 and rows.stop == k:
        return block

    def pick(values: Values) -> Values:
        return {
            n: v[rows] if isinstance(v, Tensor) and v.ndim == 2 and len(v) == k > 1 else v for n, v in values.items()
        }

    return Block(pick(block.shared), [pick(v) for v in block.states], [pick(v) for v in block.coefs])


def run(plan: Plan, how: str, x: Tensor, g: Tensor, block: Block) -> None:
    """One step of all rows of x by the chosen back end."""
    if how == "compiled":
        _compiled(plan, x, g, block)(x, g, block)
    elif how == "fused":
        _fused_step_(plan, x, g, block)
    elif plan.elementwise and x.device.type == "cpu" and x.shape[1] > _EAGER_ENTRIES:
        for columns in _pieces(x.shape[1], _EAGER_ENTRIES):
            step_block_(plan, x[:, columns], g[:, columns], _take_columns(block, columns, x.shape[1]))
    else:
        step_block_(plan, x, g, block)


def _fused_step_(plan: Plan, x: Tensor, g: Tensor, block: Block) -> None:
    """The step by torch's own kernel."""
    part, states = plan.parts[0], block.states[0]
    fused_step_(part, {"x": x, "g": g} | {s.name: states[s.name] for s in part.rule.active_states()}, block.coefs[0])


def _pieces(width: int, size: int) -> Iterator[slice]:
    for i in range(0, width, size):
        yield slice(i, min(i + size, width))


def _take_columns(block: Block, columns: slice, width: int) -> Block:
    def pick(values: Values) -> Values:
        return {
            n: v[:, columns] if isinstance(v, Tensor) and v.ndim == 2 and v.shape[1] == width else v
            for n, v in values.items()
        }

    return Block(pick(block.shared), [pick(v) for v in block.states], [pick(v) for v in block.coefs])


_COMPILED: WeakKeyDictionary[Plan, Callable[[Tensor, Tensor, Block], None]] = WeakKeyDictionary()


def _compiled(plan: Plan, x: Tensor, g: Tensor, block: Block) -> Callable[[Tensor, Tensor, Block], None]:
    """The step of a plan as one compiled function, whatever the number of rows."""
    if plan not in _COMPILED:
        _rehearse(plan, x, g, block)

        def step(x: Tensor, g: Tensor, shared: Values, states: list[Values], coefs: list[Values]) -> None:
            step_block_(plan, x, g, Block(shared, states, coefs))

        # torch.compile counts its versions per code object: each plan needs one of its own
        step.__code__ = step.__code__.replace(co_name=f"step_{len(_COMPILED)}")
        compiled = torch.compile(step, dynamic=True, fullgraph=True)
        _COMPILED[plan] = lambda x, g, b: compiled(
            x, g, _tensors(b.shared, x), b.states, [_tensors(c, x) for c in b.coefs]
        )
    return _COMPILED[plan]


def _tensors(values: Values, x: Tensor) -> Values:
    """Numbers as tensors [k, 1], in one transfer; as numbers they would be compiled in."""
    numbers = {n: v for n, v in values.items() if not isinstance(v, Tensor)}
    if not numbers:
        return values
    column = torch.tensor(list(numbers.values()), dtype=torch.float64).to(x.dtype).to(x.device)
    return {**values, **dict(zip(numbers, column[:, None, None].expand(-1, len(x), 1).unbind(0), strict=True))}


def _rehearse(plan: Plan, x: Tensor, g: Tensor, block: Block) -> None:
    """An eager step on a copy of one row, so that segments' constants exist before the step is traced."""
    one = take_rows(block, slice(0, 1), len(x))
    copies = [{n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()} for values in one.states]
    shared = {n: v.clone() if isinstance(v, Tensor) else v for n, v in one.shared.items()}
    step_block_(plan, x[:1].clone(), g[:1], Block(shared, copies, one.coefs))
