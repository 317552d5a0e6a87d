"""Transforms of a client's gradient before the rule sees it: clipping and the perpendicular gradient.

Order: value, adaptive, per tensor, over all tensors, then perpendicular. Norms are per client, never over clients.

Letters: k clients, P coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.optim.segments import Segments
from fedsim.optim.settings import Settings


def transform(x: Tensor, g: Tensor, seg: Segments, settings: Settings) -> Tensor:
    """g [k, P] after all transforms that the settings ask for."""
    clip = settings.clip
    if clip.value is not None:
        g = g.clamp(-clip.value, clip.value)
    if clip.adaptive is not None:
        g = clip_adaptive(x, g, seg, clip.adaptive)
    if clip.tensor is not None:
        g = g * seg.expand((clip.tensor / (seg.norms(g) + 1e-6)).clamp_(max=1.0))
    if clip.norm is not None:
        g = clip_norm(g, clip.norm)
    if settings.perp_grad is not None:
        g = perpendicular(x, g, seg, settings.perp_grad.rescale)
    return g


def clip_norm(g: Tensor, bound: float) -> Tensor:
    """g * min(1, bound / (norm + 1e-6)), the norm over all tensors of a client: torch's clip_grad_norm_."""
    norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    return g * (bound / (norm + 1e-6)).clamp_(max=1.0)


def clip_adaptive(x: Tensor, g: Tensor, seg: Segments, bound: float) -> Tensor:
    """Row by row, norm(g) <= bound * max(norm(x), 1e-3).

    Brock, De, Smith, Simonyan. High-performance large-scale image recognition without normalization. arXiv:2102.06171.
    """
    rows = seg.rows
    limit = rows.norms(x).clamp_(min=1e-3) * bound
    return g * rows.expand((limit / rows.norms(g).clamp_(min=1e-6)).clamp_(max=1.0))


def perpendicular(x: Tensor, g: Tensor, seg: Segments, rescale: bool) -> Tensor:
    """g minus its part along x, per tensor, optionally with g's norm restored.

    Prieto, Barsbey, Mediano, Birdal. Grokking at the edge of numerical stability. arXiv:2501.04697; the rescaling is in
    the authors' file only. Tensors of one entry are left alone: nothing is perpendicular to them, and rescaling would
    blow the rounding error up to the full gradient.
    """
    along = seg.sums(x * g) / (seg.sums(x * x) + 1e-30)
    single = seg.counts(g) < 2
    result = g - seg.expand(along.masked_fill(single, 0.0)) * x
    if rescale:
        ratio = seg.norms(g) / (seg.norms(result) + 1e-30)
        result = result * seg.expand(ratio.masked_fill(single, 1.0))
    return result
