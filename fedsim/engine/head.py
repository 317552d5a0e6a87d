"""The end of a stacked forward pass: each client's mean loss, and its gradient by the logits.

Letters: C clients, B samples, K classes, T positions. Values are [C, B, ...], or [B, ...] with one client.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from fedsim.engine.losses import Loss, cross_entropy, sample_shares
from fedsim.trees import Tree, each

FEW_CLASSES = 16


class End(Protocol):
    """The end of a pass: from some value to the loss, and back to that value's gradient.

    Attributes:
        start: the slot of the value.
        length: how many of the tape's last ops it stands for.
    """

    @property
    def start(self) -> int: ...

    @property
    def length(self) -> int: ...

    def __call__(self, value: Tensor, targets: Tree, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(loss [C] or [], gradient by the value or None where nothing before it is trained).

        Args:
            value: [C, B, ...].
            targets: [C, B] class indices, or whatever the loss takes.
            weights: [C, B], or None for equal ones.
        """
        ...


@dataclass(frozen=True)
class Head:
    """The loss alone, of the logits in a slot."""

    loss: Loss
    lead: int
    start: int
    length: int = 0

    def __call__(self, value: Tensor, targets: Tree, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return loss_and_gradient(self.loss, value, targets, weights, self.lead)


def loss_and_gradient(
    loss: Loss, logits: Tensor, targets: Tree, weights: Tensor | None, lead: int
) -> tuple[Tensor, Tensor]:
    """(loss [C] or [], gradient by the logits), for weights [.., B] or None."""
    if loss is cross_entropy:
        assert isinstance(targets, Tensor)
        return _cross_entropy(logits, targets, weights, lead)
    rows = logits.shape[: lead + 1]
    leaf = logits.detach().flatten(0, lead).requires_grad_()
    with torch.enable_grad():
        losses = loss(leaf, each(lambda t: t.flatten(0, lead), targets)).view(rows)
        losses = (losses * sample_shares(weights, losses)).sum(-1)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad.view(logits.shape)


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None, lead: int) -> tuple[Tensor, Tensor]:
    """By hand: the gradient of -log p_t is p - e_t, times the sample's share.

    With few classes torch's kernels are slow along an axis of stride 1, so the samples are laid out there.
    """
    few = logits.shape[-1] <= FEW_CLASSES and not logits.is_cuda
    axis = -2 if few else -1  # of the classes
    log_p = torch.log_softmax(logits.transpose(-1, -2).contiguous() if few else logits, axis)
    index = targets.unsqueeze(axis)
    chosen = log_p.gather(axis, index).squeeze(axis)
    grad = log_p.exp_().scatter_add_(axis, index, _minus_one(logits.dtype, logits.device).expand(index.shape))
    over = tuple(range(lead, chosen.ndim))
    if weights is None:
        count = chosen[0].numel() if lead else chosen.numel()
        loss = chosen.sum(over).mul_(-1.0 / count)
        grad.mul_(1.0 / count)
    else:
        share = sample_shares(weights, logits)
        if chosen.ndim > lead + 1:  # a sequence's loss is the mean over its positions
            share = (share / chosen.shape[-1]).unsqueeze(-1)
        loss = -(chosen * share).sum(over)
        grad.mul_(share.unsqueeze(axis))
    return loss, grad.transpose(-1, -2) if few else grad


@cache
def _minus_one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(-1.0, dtype=dtype).to(device)  # a copy is waited for, so it is there for all streams of a GPU
