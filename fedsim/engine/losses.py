"""Losses per sample, by name.

A loss takes logits [B, K] and class indices [B], or [B, T, V] and [B, T], and returns one number per sample [B];
a sequence's is the mean over its positions. A user's own loss has the same signature.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy of class indices."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return per_sample(flat.view(targets.shape))


def stablemax(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of StableMax, s(z) / sum s with s(z) = z + 1 for z >= 0 and 1 / (1 - z) below.

    Prieto, Barsbey, Mediano, Birdal. Grokking at the Edge of Numerical Stability. ICLR 2025.
    """
    # each branch sees only arguments that are harmless to it, or 1 / 0 would leave NaN in the gradient
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    chosen = s.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return per_sample(s.sum(-1).log() - chosen.log())


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "stablemax": stablemax}


def per_sample(losses: Tensor) -> Tensor:
    """[B, ...] -> [B]: the mean over everything but the samples."""
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


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
