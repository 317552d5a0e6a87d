"""The short way to a step that one of torch's kernels does whole, for stacks so small that Python is the cost.

The answer is that of the ordinary way bit for bit, since the same kernel runs on the same blocks; only what does not
apply (per-client numbers, masks, transforms, averages) is not prepared.

Letters: k clients that step, P coordinates.
"""

from __future__ import annotations

from math import isfinite

from torch import Tensor

from fedsim.optim.backends import row_blocks
from fedsim.optim.fused import fused_step_, kernel_for
from fedsim.optim.pipeline import Plan
from fedsim.optim.rule import Named
from fedsim.optim.state import OptState


def quick_step_(plan: Plan, x: Tensor, grad: Tensor, state: OptState, lr_scale: float) -> int:
    """Step the first rows as far as the short way goes; returns how many rows are done, counters included."""
    part, k = plan.parts[0], x.shape[0]
    t = int(state.t[0])
    no_kernel = kernel_for(part.rule, x.device.type, x.dtype) is None
    if no_kernel or part.plain_hypers is None or (k > 1 and bool((state.t[:k] != t).any())):
        return 0
    h = Named(part.plain_hypers)
    h.lr *= lr_scale
    coefs = {**part.rule.coefficients(h, t + 1, Named({})), "lr": h.lr}
    buffers = {s.name: state.buffers[part.name + s.name] for s in part.states}
    done = 0
    for rows in row_blocks(x, "fused"):
        whole = rows.stop - rows.start == state.num_clients
        arrays = {"x": x, "g": grad, **buffers} if whole else _rows({"x": x, "g": grad, **buffers}, rows)
        if plan.settings.skip_nonfinite and not isfinite(arrays["g"].sum().item()):
            break
        fused_step_(part, arrays, coefs)
        done = rows.stop
    if done:
        state.t[:done] += 1
    return done


def _rows(arrays: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {n: a[rows] for n, a in arrays.items()}
