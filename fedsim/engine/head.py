"""The end of a stacked forward pass: each client's mean loss, and its gradient by the logits.

Letters: C clients, B samples, K classes, T positions. Values are [C, B, ...], or [B, ...] with one client.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fedsim.engine.losses import Loss, cross_entropy, sample_shares

FEW_CLASSES = 16


def loss_and_gradient(
    loss: Loss, logits: Tensor, targets: Tensor, weights: Tensor | None, lead: int
) -> tuple[Tensor, Tensor]:
    """(loss [C] or [], gradient by the logits), for weights [.., B] or None."""
    if loss is cross_entropy:
        return _cross_entropy(logits, targets, weights, lead)
    rows = logits.shape[: lead + 1]
    leaf = logits.detach().flatten(0, lead).requires_grad_()
    with torch.enable_grad():
        losses = loss(leaf, targets.flatten(0, lead)).view(rows)
        losses = (losses * sample_shares(weights, losses)).sum(-1)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad.view(logits.shape)


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None, lead: int) -> tuple[Tensor, Tensor]:
    """By hand: the gradient of -log p_t is p - e_t, times the sample's share."""
    index = targets.unsqueeze(-1)
    log_p = _log_softmax(logits)
    chosen = log_p.gather(-1, index).squeeze(-1)
    grad = log_p.exp_().scatter_add_(-1, index, _minus_one(logits.dtype, logits.device).expand(index.shape))
    over = tuple(range(lead, chosen.ndim))
    if weights is None:
        count = chosen[0].numel() if lead else chosen.numel()
        return chosen.sum(over).mul_(-1.0 / count), grad.mul_(1.0 / count)
    share = sample_shares(weights, logits)
    if chosen.ndim > lead + 1:  # a sequence's loss is the mean over its positions
        share = (share / chosen.shape[-1]).unsqueeze(-1)
    return -(chosen * share).sum(over), grad.mul_(share.unsqueeze(-1))


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the last axis. With few classes torch's kernel is slow along an axis of stride 1, so samples go there."""
    if logits.shape[-1] > FEW_CLASSES or logits.is_cuda:
        return torch.log_softmax(logits, -1)
    return torch.log_softmax(logits.transpose(-1, -2).contiguous(), -2).transpose(-1, -2)


@cache
def _minus_one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), -1.0, dtype=dtype, device=device)
