"""How states are kept between steps: 8-bit block-wise codes, or bfloat16.

Dettmers, Lewis, Shleifer, Zettlemoyer. 8-bit optimizers via block-wise quantization. arXiv:2110.02861; tables and block
length as in bitsandbytes. A step decodes, runs any rule exactly, and encodes: the parameters move by the state that was
not yet rounded. Departure: a positive number is never coded as zero in a state that cannot be negative. Otherwise a
coordinate whose second moment rounds to zero while its first does not moves by thousands of learning rates at its next
zero gradient.

A block is 256 consecutive entries of one tensor of one client, kept as 256 bytes and its largest magnitude. Tensors of
fewer than 4096 entries and embeddings stay as they are. Note on running means with a rate as small as 1 - 0.999: in
bfloat16 (8 bits) a change below 1 / 512 of the value is lost, and the mean follows only gradients that differ much.

Letters: k clients, n entries of a state that are coded, w all of its entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from fedsim.optim.rule import Named, State
from fedsim.optim.segments import Segments

BLOCK = 256
SMALLEST = 4096  # entries of a tensor worth coding
NEVER_NEGATIVE = ("v", "v_max", "a", "n")  # by custom, the names of second moments
POINTS = ("z",)  # and of points, which bear rounding as little as the parameters


class Storage(Protocol):
    """What stands for the states of one part between steps."""

    def stored(self) -> tuple[State, ...]:
        """The buffers that are kept."""
        ...

    def decode_(self, s: Named, like: Tensor) -> None:
        """Set the rule's own states in `s` from the buffers in it, in the type of `like`."""
        ...

    def encode_(self, s: Named) -> None:
        """Write the rule's states back to the buffers."""
        ...


def make_storage(name: str, states: Sequence[State], seg: Segments, roles: Sequence[str]) -> Storage | None:
    """How a part's states are kept; None if as they are.

    Args:
        name: `fp32`, `bf16` or `dyn8`.
        states: of the part's rule.
        seg: the part's tensors.
        roles: of these tensors.
    """
    if name == "fp32" or not states:
        return None
    if name == "bf16":
        return Half(tuple(states))
    return Coded(tuple(_columns(state, seg, roles) for state in states))


def is_dense(state: State) -> bool:
    """Whether a state is many numbers that bear rounding."""
    return (
        state.code != "exact"
        and state.name not in POINTS
        and (state.per == "coordinate" or isinstance(state.per, tuple))
    )


@dataclass(frozen=True)
class Half:
    """States in bfloat16."""

    states: tuple[State, ...]

    def stored(self) -> tuple[State, ...]:
        return tuple(replace(s, name=f"{s.name}_bf16", dtype="bfloat16") if is_dense(s) else s for s in self.states)

    def decode_(self, s: Named, like: Tensor) -> None:
        for state in filter(is_dense, self.states):
            setattr(s, state.name, getattr(s, f"{state.name}_bf16").to(like.dtype))

    def encode_(self, s: Named) -> None:
        for state in filter(is_dense, self.states):
            getattr(s, f"{state.name}_bf16").copy_(getattr(s, state.name))


@dataclass(frozen=True)
class Coded:
    """States as 8-bit codes of blocks."""

    columns: tuple[Columns, ...]

    def stored(self) -> tuple[State, ...]:
        return tuple(buffer for column in self.columns for buffer in column.stored())

    def decode_(self, s: Named, like: Tensor) -> None:
        for column in self.columns:
            if column.coded:
                setattr(s, column.state.name, column.decode(s, like))

    def encode_(self, s: Named) -> None:
        for column in self.columns:
            if column.coded:
                column.encode_(s)


@dataclass(frozen=True)
class Columns:
    """One state: which of its entries are coded, and how.

    Args:
        state: as the rule declares it.
        sizes: entries of each tensor.
        is_coded: per tensor.
    """

    state: State
    sizes: tuple[int, ...]
    is_coded: tuple[bool, ...]
    _constants: dict[object, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def coded(self) -> bool:
        """Whether anything is."""
        return any(self.is_coded)

    @property
    def signed(self) -> bool:
        """Whether the state may be negative."""
        return self.state.name not in NEVER_NEGATIVE

    @cached_property
    def blocks(self) -> Segments:
        """The blocks of the coded tensors; the last one of a tensor may be short."""
        lengths: list[int] = []
        for n in self._sizes(True):
            lengths += [BLOCK] * (n // BLOCK) + ([n % BLOCK] if n % BLOCK else [])
        return Segments(tuple(lengths))

    def stored(self) -> tuple[State, ...]:
        if not self.coded:
            return (self.state,)
        name, init = self.state.name, self.state.init
        assert init >= 0, (name, init)
        first = 255 if init else (127 if self.signed else 0)  # the codes of one and of zero
        codes = State(f"{name}_codes", per=self._sizes(True), init=first, dtype="uint8", code="exact")
        top = State(f"{name}_absmax", per=(len(self.blocks.sizes),), init=init, dtype="float32", code="exact")
        rest = replace(self.state, name=f"{name}_rest", per=self._sizes(False))
        return (codes, top) if all(self.is_coded) else (codes, top, rest)

    def decode(self, s: Named, like: Tensor) -> Tensor:
        """[k, w] from the buffers in s."""
        codes, top = getattr(s, f"{self.state.name}_codes"), getattr(s, f"{self.state.name}_absmax")
        values = self._constant("table", codes).index_select(0, codes.flatten().int()).view(codes.shape)
        values = (values * self.blocks.expand(top)).to(like.dtype)
        if all(self.is_coded):
            return values
        sources = {True: values.split(self._run_sizes(True), 1), False: self._rest(s).split(self._run_sizes(False), 1)}
        pieces = {coded: iter(parts) for coded, parts in sources.items()}
        return torch.cat([next(pieces[coded]) for coded, _ in self.runs], 1)

    def encode_(self, s: Named) -> None:
        """Write the state [k, w] in s to the buffers there."""
        whole = getattr(s, self.state.name)
        value = whole if all(self.is_coded) else self._gathered(whole, True)
        value = value.float()
        top = self.blocks.maxima(value.abs())
        scaled = (value * self.blocks.expand(top.clamp(min=1e-38).reciprocal_())).view(-1)
        # which code the leading bits leave open, one comparison decides: many times faster than a binary search
        low = self._constant("lowest", value).index_select(0, (scaled.view(torch.int32) >> 16) & 0xFFFF)
        codes = low + (scaled > self._constant("bounds", value).index_select(0, low.int())).to(torch.uint8)
        getattr(s, f"{self.state.name}_codes").copy_(codes.view(value.shape))
        getattr(s, f"{self.state.name}_absmax").copy_(top)
        if not all(self.is_coded):
            self._rest(s).copy_(self._gathered(whole, False))

    def _rest(self, s: Named) -> Tensor:
        """[k, w - n] the entries that are not coded."""
        return getattr(s, f"{self.state.name}_rest")

    def _gathered(self, whole: Tensor, coded: bool) -> Tensor:
        """The entries [k, n] that are coded, or the others, from [k, w]."""
        pieces = whole.split([size for _, size in self.runs], 1)
        return torch.cat([p for p, (own, _) in zip(pieces, self.runs, strict=True) if own == coded], 1)

    @cached_property
    def runs(self) -> tuple[tuple[bool, int], ...]:
        """(coded, entries) of neighbouring tensors of one kind, in order."""
        pairs = zip(self.is_coded, self.sizes, strict=True)
        return tuple((coded, sum(n for _, n in run)) for coded, run in groupby(pairs, key=lambda pair: pair[0]))

    def _run_sizes(self, coded: bool) -> list[int]:
        return [size for own, size in self.runs if own == coded]

    def _sizes(self, coded: bool) -> tuple[int, ...]:
        return tuple(n for n, is_coded in zip(self.sizes, self.is_coded, strict=True) if is_coded == coded)

    def _constant(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.device)
        if key not in self._constants:
            self._constants[key] = self._make(name).to(like.device)
        return self._constants[key]

    def _make(self, name: str) -> Tensor:
        return {"table": code_table, "bounds": code_bounds, "lowest": lowest_codes}[name](self.signed)


def code_table(signed: bool) -> Tensor:
    """[256] ascending float32: the numbers in [-1, 1], or [0, 1], that the codes 0 to 255 stand for.

    For i = 0..6, the midpoints of 2^i (unsigned: 2^(i + 1)) equal pieces of [0.1, 1] times 10^(i - 6), with both signs
    if signed; and 0 and 1.

    >>> code_table(True)[[0, 127, 255]], code_table(False)[:2]
    (tensor([-0.9930,  0.0000,  1.0000]), tensor([0.0000e+00, 3.2500e-07]))
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        points = ((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)).tolist()
        values += points + ([-p for p in points] if signed else [])
    return torch.tensor(sorted(values))


def code_bounds(signed: bool) -> Tensor:
    """[256] float32: numbers above the i-th have codes above i; the table's midpoints, and infinity.

    Unsigned, the first one is zero: whatever is positive has code 1 at least.
    """
    table = code_table(signed)
    bounds = torch.cat([(table[:-1] + table[1:]) / 2, torch.tensor([torch.inf])])
    if not signed:
        bounds[0] = 0.0
    return bounds


def lowest_codes(signed: bool) -> Tensor:
    """[65536] uint8: the least code of the numbers whose first 16 bits are these; no other has more than one above."""
    first = (torch.arange(1 << 16) << 16).to(torch.int32)
    ends = torch.stack([first.view(torch.float32), (first | 0xFFFF).view(torch.float32)]).nan_to_num(0.0)
    low, high = (torch.bucketize(end, code_bounds(signed), out_int32=True) for end in (ends.amin(0), ends.amax(0)))
    finite = ends.isfinite().all(0) & (ends.abs().amax(0) <= 2)  # what is divided by its block's largest is at most one
    assert bool((high - low)[finite].max() <= 1)
    return low.to(torch.uint8)


def _columns(state: State, seg: Segments, roles: Sequence[str]) -> Columns:
    sizes = state.per if isinstance(state.per, tuple) else seg.sizes
    of = roles if state.per == "coordinate" else [roles[0]] * len(sizes)  # tensors in the rule's own order: one role
    fit = tuple(is_dense(state) and n >= SMALLEST and role != "embed" for n, role in zip(sizes, of, strict=True))
    return Columns(state, sizes, fit)
