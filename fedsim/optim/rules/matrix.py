"""Rules on whole matrices: Muon and Hybrid-AuON; and how matrices of a flat stack are worked on together.

All matrices of one shape, over layers and over clients, are one batch [k, G, a, b]: the number of launches grows with
the number of different shapes, not with clients or layers. A kernel [out, in, kh, kw] is a matrix [out, in * kh * kw].

Letters: k clients, G matrices of one shape [a, b] (a outputs, b inputs), l >= s the longer and shorter of a and b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Decay, Named, Reach, Rule, State, Whole
from fedsim.optim.segments import Segments

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Group:
    """The matrices of one shape in a flat stack.

    Args:
        shape: (a, b).
        tensors: their places among the tensors, ascending.
        starts: where each begins in the flat vector.
    """

    shape: tuple[int, int]
    tensors: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def count(self) -> int:
        """G."""
        return len(self.tensors)

    @property
    def short(self) -> int:
        """s."""
        return min(self.shape)

    @property
    def long(self) -> int:
        """l."""
        return max(self.shape)

    @property
    def size(self) -> int:
        """a * b."""
        return self.shape[0] * self.shape[1]

    def take(self, flat: Tensor) -> Tensor:
        """[k, G, a, b] from flat [k, P]: a view where the matrices lie side by side, else one gather."""
        if self._side_by_side:
            return flat.narrow(1, self.starts[0], self.size * self.count).unflatten(1, (self.count, *self.shape))
        return flat.index_select(1, _columns(self, flat.device)).unflatten(1, (self.count, *self.shape))

    def put_(self, flat: Tensor, matrices: Tensor) -> None:
        """The inverse of `take`: write matrices [k, G, a, b] to their places in flat [k, P]."""
        if self._side_by_side:
            flat.narrow(1, self.starts[0], self.size * self.count).unflatten(1, matrices.shape[1:]).copy_(matrices)
        else:
            flat.index_copy_(1, _columns(self, flat.device), matrices.flatten(1))

    @property
    def _side_by_side(self) -> bool:
        return self.starts[-1] - self.starts[0] == self.size * (self.count - 1)


@lru_cache(maxsize=256)
def groups_of(segments: Segments) -> tuple[Group, ...]:
    """The matrices of a flat vector by shape, in the order of each shape's first matrix."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(segments.shapes):
        by_shape.setdefault(shape, []).append(i)
    return tuple(
        Group(shape, tuple(which), tuple(segments.offsets[i] for i in which)) for shape, which in by_shape.items()
    )


@lru_cache(maxsize=256)
def _columns(group: Group, device: torch.device) -> Tensor:
    return (torch.tensor(group.starts)[:, None] + torch.arange(group.size)).reshape(-1).to(device)


def tall(m: Tensor) -> Tensor:
    """[..., l, s]: m, or its transpose (a view) where it is wider than tall."""
    return m if m.shape[-2] >= m.shape[-1] else m.mT


def untall(m: Tensor, shape: tuple[int, int]) -> Tensor:
    """[..., a, b] from [..., l, s]."""
    return m if shape[0] >= shape[1] else m.mT


def newton_schulz(m: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Roughly the nearest matrix with orthonormal rows or columns, by `steps` odd polynomials of m / norm(m).

    X <- 3.4445 X + (-4.7750 A + 2.0315 A^2) X with A = X X^T [s, s]. The singular values end near [0.7, 1.2], not at 1.
    Jordan et al. Muon (2024), github.com/KellerJordan/Muon; the norm is bounded below by eps, as in torch.optim.Muon.

    Args:
        m: [..., a, b].

    Returns:
        [..., a, b] in m's type.
    """
    first, second, third = NEWTON_SCHULZ
    x = m.mT if m.shape[-2] > m.shape[-1] else m
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp_(min=eps)).flatten(0, -3)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        x = torch.baddbmm(x, poly, x, beta=first)
    x = x.unflatten(0, m.shape[:-2])
    return x.mT if m.shape[-2] > m.shape[-1] else x


def _momentum(g: Tensor, s: Named, c: Named, nesterov: bool) -> Tensor:
    """m = momentum * m + (1 - momentum) * g; the same mean of g and m (Nesterov), or m."""
    s.m.lerp_(g, c.take)
    return g.lerp(s.m, c.keep) if nesterov else s.m


@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """Muon: u = kappa * newton_schulz(momentum), matrices only.

    Jordan et al. (2024), as torch.optim.Muon on matrices [out, in * kh * kw] (the authors' file takes kappa = 1 for
    kernels). Newton-Schulz costs (20 s + 10 s^2 / l) / (6 B) of the forward and backward pass on B samples: 13 to 20
    times as much for s = 128, B = 32.

    Args:
        steps: of Newton-Schulz; 0 leaves the momentum divided by its Frobenius norm.
        kappa: sqrt(max(1, a / b)) (`original`), or 0.2 * sqrt(max(a, b)) (`match_rms_adamw`: AdamW's learning rate and
            decay can be kept; Liu et al. arXiv:2502.16982).
        precision: of Newton-Schulz: `auto` is bf16 on a GPU and the parameters' own type elsewhere, `full` that type
            everywhere, `bf16` everywhere.
    """

    momentum: Beta = 0.95
    nesterov: bool = True
    steps: Whole = 5
    kappa: Literal["original", "match_rms_adamw"] = "original"
    precision: Literal["auto", "full", "bf16"] = "auto"

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    reach: ClassVar[Reach] = "matrix"
    roles: ClassVar[tuple[str, ...]] = ("matrix",)
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 0.02
    default_weight_decay: ClassVar[float] = 0.1

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"keep": self.momentum, "take": 1 - self.momentum}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        m = _momentum(g, s, c, self.nesterov)
        half = self.precision == "bf16" or (self.precision == "auto" and g.is_cuda)
        u = torch.empty_like(m, memory_format=torch.contiguous_format)
        for group in groups_of(seg):
            matrices = group.take(m)
            x_ns = newton_schulz(matrices.bfloat16() if half else matrices, self.steps)
            group.put_(u, x_ns.to(m.dtype).mul_(self._scale(*group.shape)))
        return u

    def _scale(self, a: int, b: int) -> float:
        if self.kappa == "original":
            return max(1.0, a / b) ** 0.5
        return 0.2 * max(a, b) ** 0.5


@dataclass(frozen=True, kw_only=True)
class HybridAuOn(Rule):
    """Hybrid AuON: X = newton_schulz(G); u = X / (rms(cosh(X)) + 1e-8), with G the Nesterov mean of gradients.

    AuON (2025), github.com/ryyzn9/AuON. The paper takes one Newton-Schulz iteration and cosh of X itself, which is the
    default (where the paper prints rms once without its root, the root is meant). `steps=5, raw=True` is the package:
    cosh(1.5 * X / norm(X)) divides X, which is Muon without kappa up to 1e-3. With one iteration norm(X) <= 3.5, so the
    divisor is at most 1.05 from 128 entries on.

    Args:
        steps: of Newton-Schulz.
    """

    momentum: Beta = 0.95
    steps: Whole = 1
    raw: bool = False

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    reach: ClassVar[Reach] = "matrix"
    roles: ClassVar[tuple[str, ...]] = ("matrix",)
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 0.24

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"keep": self.momentum, "take": 1 - self.momentum}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        mean = _momentum(g, s, c, nesterov=True)
        u = torch.empty_like(mean, memory_format=torch.contiguous_format)
        for group in groups_of(seg):
            x_ns = newton_schulz(group.take(mean), self.steps)
            inside = 1.5 * x_ns / (torch.linalg.matrix_norm(x_ns, keepdim=True) + 1e-7) if self.raw else x_ns
            rms = inside.cosh().square_().mean((-2, -1), keepdim=True).sqrt_()
            group.put_(u, x_ns / rms.add_(1e-8))
        return u
