"""Losses per sample, by name.

A loss takes outputs [B, ...] and targets [B, ...] and returns one number per sample [B]; where a sample has many
outputs it is the mean over these. A user's own loss has the same signature.

Letters: B samples, K classes, T positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.trees import IGNORED

Loss = Callable[[Tensor, Any], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy of class indices: logits [B, K] and targets [B], or [B, T, K] and [B, T]."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return per_sample(flat.view(targets.shape))


def masked_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy of tokens, over the positions whose target is not -100; 0 for a sample without any."""
    total, count = token_losses(logits, targets)
    return total / count.clamp(min=1)


def stablemax(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of StableMax, s(z) / sum s with s(z) = z + 1 for z >= 0 and 1 / (1 - z) below.

    Prieto, Barsbey, Mediano, Birdal. Grokking at the Edge of Numerical Stability. ICLR 2025.
    """
    # each branch sees only arguments that are harmless to it, or 1 / 0 would leave NaN in the gradient
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    chosen = s.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return per_sample(s.sum(-1).log() - chosen.log())


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of numbers."""
    return per_sample((as_targets(outputs, targets) - targets).square())


def mae(outputs: Tensor, targets: Tensor) -> Tensor:
    """Absolute error of numbers."""
    return per_sample((as_targets(outputs, targets) - targets).abs())


def huber(outputs: Tensor, targets: Tensor, *, delta: float = 1.0) -> Tensor:
    """Half the squared error of numbers up to `delta`, linear beyond.

    Args:
        delta: the error from which on the loss is linear.
    """
    away = (as_targets(outputs, targets) - targets).abs()
    return per_sample(torch.where(away < delta, 0.5 * away.square(), delta * (away - 0.5 * delta)))


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of labels that are there or not, 1 or 0 each, by a logit for each."""
    z = as_targets(logits, targets)
    return per_sample(F.binary_cross_entropy_with_logits(z, targets.to(z.dtype), reduction="none"))


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "masked_cross_entropy": masked_cross_entropy,
    "stablemax": stablemax,
    "mse": mse,
    "mae": mae,
    "huber": huber,
    "binary_cross_entropy": binary_cross_entropy,
}

OF_CLASSES = frozenset({"cross_entropy", "masked_cross_entropy", "stablemax"})
"""Those that take class indices and a logit for each class; the others compare numbers with numbers."""


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """([B] the sum of the cross-entropies at the positions that count, [B] how many these are)."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
    counts = (targets != IGNORED).to(logits.dtype)
    return _total(flat.view(targets.shape)), _total(counts)


def as_targets(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs in the shape of their targets: [B, 1] of a model with one output is as good as [B].

    Raises:
        ValueError: for any other difference, which would otherwise be broadcast.
    """
    if outputs.shape == (*targets.shape, 1):
        return outputs.squeeze(-1)
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs {list(outputs.shape)} do not match targets {list(targets.shape)}")
    return outputs


def per_sample(values: Tensor) -> Tensor:
    """[B, ...] -> [B]: the mean over everything but the samples."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def _total(values: Tensor) -> Tensor:
    """[B, ...] -> [B]: the sum over everything but the samples."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def sample_shares(weights: Tensor | None, like: Tensor) -> Tensor:
    """How much each sample counts in its client's mean loss.

    Args:
        weights: [..., B], or None for equal ones.
        like: a tensor [..., B, ...] of the dtype and device wanted; used where weights are None.

    Returns:
        [..., B] (or [B]), rows summing to one, or zero where all weights are zero.
    """
    if weights is None:
        return torch.full((like.shape[-1],), 1.0 / like.shape[-1], dtype=like.dtype, device=like.device)
    total = weights.sum(-1, keepdim=True)
    return weights.to(like.dtype) / torch.where(total > 0, total, torch.ones_like(total))
