"""Squared distances between many long vectors.

|a - b|^2 = |a|^2 + |b|^2 - 2 a.b turns n^2 P subtractions into one matrix product, at the price of cancellation where a
and b are close together and far from the origin. Three things keep it exact enough to rank by: everything is measured
from a row in the middle of the crowd, sums are in float64, and pairs that still cancel are subtracted directly.

Letters: C rows a, M rows b, P entries of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.aggregate.base import finite_rows, numbers_at_once
from fedsim.graph import Graph

FAR = torch.finfo(torch.float64).max
"""The distance to a row with a NaN or an infinity: farther than any finite one, nearer than none at all (inf)."""

_CANCELS = 1e-6  # below this share of |a|^2 + |b|^2 fewer than ten digits of a difference are left


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 for all pairs.

    Args:
        a: [C, P].
        b: [M, P]; may be `a` itself.

    Returns:
        [C, M] float64, relative error below 1e-9; FAR where either row is not finite. Equal rows are at exactly 0.
    """
    same = a is b
    ok_b = finite_rows(b)
    ok_a = ok_b if same else finite_rows(a)
    gram, norm_a, norm_b = _products(a, b, _middle_row(b, ok_b))
    scale = norm_a[:, None] + norm_b
    out = scale - 2.0 * gram
    known = ok_a[:, None] & ok_b
    _subtract_directly_(out, a, b, known & ~(out > _CANCELS * scale), same)
    return out.masked_fill_(~known, FAR)


def distances_along(heard: Graph, pivot: Tensor, sent: Tensor) -> Tensor:
    """|a_i - b_j|^2 for the pairs of a graph of C who hear some of M vectors sent.

    Args:
        heard: with E pairs.
        pivot: [C, P], each one's own vector.
        sent: [M, P].

    Returns:
        [E] float64; see `squared_distances`.
    """
    if heard.is_dense(len(sent)):
        return squared_distances(pivot, sent)[heard.hearers, heard.peers]
    out = torch.full(heard.peers.shape, FAR, dtype=torch.float64, device=sent.device)
    for pairs in torch.arange(len(out), device=out.device).split(max(1, numbers_at_once(out.device) // sent.shape[1])):
        a, b = pivot[heard.hearers[pairs]], sent[heard.peers[pairs]]
        out[pairs] = (a.to(torch.float64) - b.to(torch.float64)).square().sum(1).nan_to_num(FAR, FAR)
    return out


def centred_products(v: Tensor) -> Tensor:
    """[R, R] float64: inner products of finite rows v [R, P], measured from a row in the middle of the crowd.

    With them the distance from a row to a mixture of rows can be had where squared distances would cancel: a row far
    away does not enter the products of the others with each other.
    """
    return _products(v, v, _middle_row(v, torch.ones(v.shape[0], dtype=torch.bool, device=v.device)))[0]


def _products(a: Tensor, b: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products [C, M] of the rows less the centre [P], and squared norms [C] and [M], all float64."""
    same = a is b
    gram = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    norm_a = gram.new_zeros(a.shape[0])
    norm_b = norm_a if same else gram.new_zeros(b.shape[0])
    width = max(256, numbers_at_once(a.device) // (a.shape[0] + b.shape[0]))
    for start in range(0, a.shape[1], width):
        at = slice(start, start + width)
        part_b = b[:, at].to(torch.float64) - centre[at]
        part_a = part_b if same else a[:, at].to(torch.float64) - centre[at]
        gram.addmm_(part_a, part_b.T)
        norm_a += torch.linalg.vecdot(part_a, part_a)
        if not same:
            norm_b += torch.linalg.vecdot(part_b, part_b)
    if same:  # a product of matrices may round (i, j) and (j, i) differently
        gram = gram.tril() + gram.tril(diagonal=-1).T
    return gram, norm_a, norm_b


def _middle_row(v: Tensor, ok: Tensor) -> Tensor:
    """[P] float64: the finite row nearest to the coordinatewise median on a sample of the columns; zeros if none is."""
    rows = ok.nonzero()[:, 0]
    if not rows.numel():
        return v.new_zeros(v.shape[1], dtype=torch.float64)
    sampled = v[:, :: max(1, v.shape[1] // 1024)][rows].to(torch.float64)
    median = sampled.sort(dim=0).values[len(rows) // 2]
    nearest = int(torch.linalg.vector_norm(sampled - median, dim=1).argmin())
    return v[rows[nearest]].to(torch.float64)


def _subtract_directly_(out: Tensor, a: Tensor, b: Tensor, which: Tensor, same: bool) -> None:
    """Fill in |a_i - b_j|^2 for the marked pairs without the product."""
    if same:
        out.fill_diagonal_(0.0)
        which = which.triu(diagonal=1)
    for pairs in which.nonzero().split(max(1, numbers_at_once(a.device) // a.shape[1])):
        i, j = pairs.unbind(1)
        d = (a[i].to(torch.float64) - b[j].to(torch.float64)).square().sum(1)
        out[i, j] = d
        if same:
            out[j, i] = d
