"""FRUGAL: an adaptive rule on a part of each matrix gradient that changes now and then, sign descent on the rest.

Zmushko et al. FRUGAL: memory-efficient optimization by reducing state overhead for scalable training.
arXiv:2411.07837. Departures: singular vectors have fixed signs; the rest of the kinds `svd` and `randomized`
counts as zero where it is rounding error.

Letters: k clients, G matrices of one shape [a, b], r entries kept of n; L tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.config import FromTable
from fedsim.optim.rule import Count, Decay, Named, Rule, Size, State, Within
from fedsim.optim.rules.adaptive import Adam
from fedsim.optim.rules.galore import COLUMNS
from fedsim.optim.rules.matrix import Group, groups_of, tall, untall
from fedsim.optim.rules.subspace import LowRank, Slots, back, flat_of, like_parts, refresh_, sized
from fedsim.optim.segments import Segments

_ROUNDING = 1e-6  # of the largest gradient entry: a rest below it is no gradient


@dataclass(frozen=True, kw_only=True)
class Frugal(LowRank):
    """FRUGAL: u = inner(part of g) + rest_scale * sign(the rest of g).

    Every `gap` steps each client draws its part anew, keyed by client and step, and the inner rule starts again.
    Moments have the size of the part, except for `blocks`, whose parts differ in size between clients.

    Args:
        density: share of the entries in the part.
        gap: steps between two draws, the first of which is a client's first step.
        kind: `columns` or `rows` of each matrix, `randk` entries of it, `blocks` (whole matrices), or its leading
            singular directions: `svd`, or nearly those and cheaper, `randomized` (see `sketched_columns`). With both a
            matrix of rank r or less, such as that of a layer with fewer samples in the batch, leaves nothing but
            rounding to the rest.
        order: of `blocks`: `random`, or from the first, the last, or both ends on.
        rest: what the rest does: `sign`, `sgd` or `none`.
        rest_scale: 1 for training from the start, 0.1 for fine-tuning, in the paper.
        inner: {name, ...} of the rule on the part, by default `adam`.
    """

    density: Annotated[float, Within(0, 1, closed=True)] = 0.25
    gap: Count = 200
    kind: Literal["columns", "rows", "randk", "blocks", "svd", "randomized"] = "columns"
    order: Literal["random", "ascending", "descending", "mirror"] = "random"
    rest: Literal["sign", "sgd", "none"] = "sign"
    rest_scale: Size = 1.0
    inner: Annotated[Rule, FromTable("inner_rule", "adam")] = Adam()

    inputs: ClassVar[tuple[str, ...]] = ("noise",)
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-3
    default_weight_decay: ClassVar[float] = 0.01

    def sized_states(self, seg: Segments) -> tuple[State, ...]:
        own = self.inner.active_states()
        if self.kind == "blocks":
            self._num_active(len(seg.sizes))
            return (State("active", per="tensor", dtype="uint8", code="exact"), *own)
        low = sized(own, _slots(seg, self.kind, self.density, "low").sizes)
        if self.kind in COLUMNS:
            return (State("basis", per=_slots(seg, self.kind, self.density, "basis").sizes, code="exact"), *low)
        index = _slots(seg, self.kind, self.density, "index").sizes
        return (State("index", per=index, dtype="int32", code="exact"), *low)

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        draws = self.kind in ("columns", "rows", "randk") or (self.kind == "blocks" and self.order == "random")
        return self.inputs if draws and bool(((t - 1) % self.gap == 0).any()) else ()

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        own = {"refresh": (t - 1) % self.gap == 0, "round": (t - 1) // self.gap, "rest_scale": self.rest_scale}
        return {**self.inner.coefficients((t - 1) % self.gap + 1, lr, host), **own}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        for state in self.inner.active_states():
            old = getattr(s, state.name)
            refresh_(old, c.refresh, partial(torch.full_like, fill_value=state.init), old)
        if self.kind in COLUMNS:
            return self._by_directions(g, s, c, seg)
        if self.kind == "blocks":
            nth = c.round if isinstance(c.round, Tensor) else g.new_full((len(g), 1), c.round)
            refresh_(s.active, c.refresh, partial(self._active, seg), nth, getattr(s, "noise", g))
            return torch.where(seg.expand(s.active) > 0, self.inner.direction(x, g, s, c, seg), self._rest(g, c))
        return self._by_index(g, s, c, seg)

    def _rest(self, g: Tensor, c: Named) -> Tensor:
        """What moves outside the part, [k, P]."""
        if self.rest == "none":
            return torch.zeros_like(g, memory_format=torch.contiguous_format)
        return (g.sign() if self.rest == "sign" else g) * c.rest_scale

    def _by_index(self, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        """Columns, rows or single entries; an index has no rounding, so neither has the rest."""
        where, low = [], []
        for group, index in zip(
            groups_of(seg), _slots(seg, self.kind, self.density, "index").views(s.index), strict=True
        ):
            m = _turned(group.take(g), self.kind)
            noise = group.take(getattr(s, "noise", g))  # without noise no client's flag is set
            refresh_(index, c.refresh, partial(self._drawn, index.shape[-1]), noise)
            where.append(index.long()[..., None, :].expand(*m.shape[:-1], -1))
            low.append(m.gather(-1, where[-1]))
        flat = flat_of(low)
        parts = like_parts(self.inner.direction(flat, flat, s, c, seg), low)
        u = self._rest(g, c)
        for group, index, part in zip(groups_of(seg), where, parts, strict=True):
            group.put_(u, _turned_back(_turned(group.take(u), self.kind).scatter(-1, index, part), self.kind, group))
        return u

    def _drawn(self, num: int, noise: Tensor) -> Tensor:
        """[rows, G, r] ascending places: the r largest of one random number per place."""
        keys = _turned(noise, self.kind)[..., 0, :]
        return keys.topk(num, dim=-1, sorted=False).indices.sort(-1).values

    def _by_directions(self, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        """The leading singular directions."""
        bases, low = _slots(seg, self.kind, self.density, "basis").views(s.basis), []
        rest = torch.empty_like(g, memory_format=torch.contiguous_format)
        for group, basis in zip(groups_of(seg), bases, strict=True):
            m = tall(group.take(g))
            refresh_(basis, c.refresh, lambda m, rank=basis.shape[-1]: COLUMNS[self.kind](m, rank), m)
            low.append(m @ basis)
            left = m - low[-1] @ basis.mT
            left.masked_fill_(left.abs() <= _ROUNDING * m.abs().amax((-2, -1), keepdim=True), 0.0)
            group.put_(rest, untall(left, group.shape))
        flat = flat_of(low)
        parts = like_parts(self.inner.direction(flat, flat, s, c, seg), low)
        return back(parts, bases, seg, g).add_(self._rest(rest, c))

    def _num_active(self, num_tensors: int) -> int:
        """How many tensors the inner rule works on at a time."""
        num = round(num_tensors * self.density)
        if self.order == "mirror" and num % 2:
            raise ValueError(
                f"Frugal.order=mirror takes matrices in pairs, and density={self.density} of {num_tensors} are {num}; "
                "choose a density that gives an even number"
            )
        return num

    def _active(self, seg: Segments, nth: Tensor, noise: Tensor) -> Tensor:
        """[rows, L] bool, whose turn it is in the nth [rows, 1] draw."""
        num_tensors = len(seg.sizes)
        num = self._num_active(num_tensors)
        if self.order == "random":
            keys = noise.index_select(1, torch.tensor(seg.offsets, device=noise.device))
            return keys.argsort(1).argsort(1) < num
        place = torch.arange(num_tensors, device=nth.device)[None]
        if self.order == "mirror":
            half = num_tensors // 2
            from_end = torch.minimum(place, num_tensors - 1 - place)
            return ((from_end - nth * (num // 2)) % max(half, 1) < num // 2) & (from_end < half)
        if self.order == "descending":
            place = num_tensors - 1 - place
        return (place - nth * num) % num_tensors < num


@lru_cache(maxsize=256)
def _slots(seg: Segments, kind: str, density: float, what: str) -> Slots:
    """The slots of the part (`low`), of its `index`, or of its `basis`."""
    shapes: list[tuple[int, ...]] = []
    for group in groups_of(seg):
        m, n = _turned_shape(group, kind)
        r = round(n * density) if kind in COLUMNS else int(n * density)
        shapes.append({"low": (m, r), "index": (r,), "basis": (n, r)}[what])
    return Slots(groups_of(seg), tuple(shapes))


def _turned_shape(group: Group, kind: str) -> tuple[int, int]:
    """A matrix's shape seen so that the part is some of its columns."""
    a, b = group.shape
    if kind in COLUMNS:
        return group.long, group.short
    return {"columns": (a, b), "rows": (b, a), "randk": (1, a * b)}[kind]


def _turned(m: Tensor, kind: str) -> Tensor:
    """[..., a, b] seen so that the part is some of its columns."""
    if kind == "rows":
        return m.mT
    return m.flatten(-2).unsqueeze(-2) if kind == "randk" else m


def _turned_back(m: Tensor, kind: str, group: Group) -> Tensor:
    """The inverse of `_turned`."""
    return m.mT if kind == "rows" else m.reshape(*m.shape[:-2], *group.shape)
