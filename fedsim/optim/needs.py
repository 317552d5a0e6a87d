"""What a step needs beside a gradient, from what a task can compute on a minibatch: the seam of the training loop.

    check_needs(optimizer, task)                                   # once, when the run is built
    gradient, aux = supply(optimizer, x, state, task.oracle(batch, buffers), streams=streams)
    if gradient is None:
        gradient = ...                                             # the ordinary one
    optimizer.step_(x, gradient, state, aux=aux, streams=streams)

A need has one name, the same in `Rule.needs`, in `Task.lacks` and, where it is a tensor for the rule, in `aux`. So a
later need (layer inputs and outputs, gradients of half batches) is one method of the oracle and one line of `supply`.

Letters: k clients that step, P trainable coordinates, B samples, L tensors, q points per client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.assemble import by_step
from fedsim.optim.core import Optimizer
from fedsim.optim.segments import Segments
from fedsim.optim.settings import Private, ZerothOrder
from fedsim.optim.state import OptState
from fedsim.optim.transforms import transform
from fedsim.streams import Streams
from fedsim.task import Oracle, Task


def check_needs(optimizer: Optimizer, task: Task) -> None:
    """Refuse an optimizer whose needs the task cannot supply.

    Raises:
        ValueError: naming what is missing, and why.
    """
    for need in sorted(optimizer.needs - {"grad"}):
        why = task.lacks(need)
        if why is not None:
            raise ValueError(f"optimizer {optimizer.spec['name']!r} needs {need}, but {why}; choose another rule")


def supply(
    optimizer: Optimizer,
    x: Tensor,
    state: OptState,
    oracle: Oracle,
    *,
    streams: Streams,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What the next step of x's k clients needs.

    Args:
        optimizer: whose needs the task does not lack (`check_needs`).
        x: [k, P], where the gradient is taken.
        state: of C >= k clients.
        oracle: of the k clients' present batches.
        streams: of the k clients.

    Returns:
        (gradient [k, P], aux for `Optimizer.step_`); gradient is None where the ordinary one is wanted. Of a gradient
        from losses or from clipped samples, aux tells what it was made with: the slopes [k, n], or the bounds.
    """
    wanted, t = optimizer.wanted(state, len(x)), state.t[: len(x)].numpy() + 1
    settings, gradient, aux = optimizer.settings, None, {}
    if "loss_eval" in wanted:
        assert settings.zeroth_order is not None
        gradient, slopes = zeroth_order_gradient(x, oracle.losses, settings.zeroth_order, streams, t)
        aux["loss_eval"] = slopes
    if "per_sample_norms" in wanted:
        assert settings.dp is not None
        bounds = _on_device(settings.dp.bounds(optimizer.layout), x.dtype, x.device)
        gradient = private_gradient(x, oracle, settings.dp, bounds, streams, t)
        aux["per_sample_norms"] = bounds
    if "sampled_grad" in wanted:
        aux["sampled_grad"] = transform(
            x, oracle.sampled_grad(x), optimizer.recipe.segments, replace(settings, perp_grad=None)
        )
        aux["batch_size"] = oracle.num_labels().to(x)[:, None]
    if "hvp" in wanted:
        z = by_step(streams, t, x, "hvp", Streams.rademacher)
        aux["hvp"] = z * oracle.hvp(x, z)
    return gradient, aux


@cache
def _on_device(bounds: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(bounds, dtype=dtype, device=device)


def zeroth_order_gradient(
    x: Tensor,
    losses: Callable[[Tensor], Tensor],
    how: ZerothOrder,
    streams: Streams,
    t: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """(gradient [k, P], slopes [k, n]): the mean over n directions of slope * z; see `ZerothOrder`.

    Args:
        x: [k, P].
        losses: [q, k] at points [q, k, P].
        how: distance and number of directions.
        streams: of the k clients.
        t: [k] step numbers, part of the key of z.
    """
    gradient, slopes = torch.zeros_like(x, memory_format=torch.contiguous_format), []
    for i in range(how.directions):
        z = by_step(streams, t, x, f"direction {i}")
        ahead, behind = losses(torch.stack([x + how.eps * z, x - how.eps * z]))
        slopes.append((ahead - behind) / (2 * how.eps))
        gradient += slopes[-1][:, None] * z
    return gradient.div_(how.directions), torch.stack(slopes, 1)


def private_gradient(
    x: Tensor,
    oracle: Oracle,
    how: Private,
    bounds: Tensor,
    streams: Streams,
    t: np.ndarray,
) -> Tensor:
    """[k, P] clipped, noisy mean of the samples' gradients; see `Private`.

    Args:
        x: [k, P].
        oracle: gives the clipped sum.
        how: noise multiplier and batch size.
        bounds: [1] on the norm over all tensors, or [L] one per tensor; a controller may change them between steps.
        streams: of the k clients.
        t: [k] step numbers, part of the key of the noise.
    """
    total = oracle.clipped_sum(x, bounds)
    if how.noise > 0:
        z = by_step(streams, t, x, "dp")
        total = total + z * (torch.linalg.vector_norm(bounds) * how.noise)
    if how.batch_size is not None:
        return total / how.batch_size
    return total / oracle.batch_sizes().to(x).clamp_(min=1)[:, None]


def sample_factors(square_norms: Tensor, bounds: Tensor) -> Tensor:
    """[k, B, L] factors min(1, bound / (norm + 1e-6)) from squared norms per tensor [k, B, L].

    With bounds [1] the norm is over all tensors of a sample, with [L] each tensor has its own.
    """
    if len(bounds) == 1:
        square_norms = square_norms.sum(-1, keepdim=True).expand_as(square_norms)
    return (bounds / (square_norms.sqrt() + 1e-6)).clamp_(max=1.0)


def clip_and_sum(per_sample: Tensor, bounds: Tensor, seg: Segments) -> Tensor:
    """[k, P] clipped sum of per-sample gradients [k, B, P], for oracles that have them all."""
    flat = per_sample.flatten(0, 1)
    factors = sample_factors(seg.sums(flat * flat).unflatten(0, per_sample.shape[:2]), bounds)
    return (per_sample * seg.expand(factors.flatten(0, 1)).view_as(per_sample)).sum(1)
