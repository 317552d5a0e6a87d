"""What every aggregator and pre-aggregator of the tables must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS

F = 2
N = 13
ROBUST = [name for name in AGGREGATORS if name not in ("mean", "centered_clipping")]
IS_MEAN_WITHOUT_FAULTS = ["mean", "trimmed_mean", "nna", "mda", "mva", "smea", "multi_krum", "meamed", "phocas", "caf"]
MOVES_WITH_ITS_ROWS = [name for name in AGGREGATORS if name != "centered_clipping"]


def build(table: dict[str, type], name: str, f: int):  # type: ignore[no-untyped-def]
    return table[name](f=f) if "f" in table[name].__dataclass_fields__ else table[name]()


def aggregate(name: str, v: torch.Tensor, f: int = F) -> torch.Tensor:
    return build(AGGREGATORS, name, f)(v, torch.ones(len(v), dtype=v.dtype))


def rows(n: int = N, entries: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, entries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_order_of_the_rows_does_not_matter(name: str) -> None:
    v = rows()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    if name == "nna":  # its first row is the trusted one
        order = torch.cat([torch.zeros(1, dtype=torch.int64), order[order > 0]])
    assert torch.allclose(aggregate(name, v[order]), aggregate(name, v), atol=1e-9)


@pytest.mark.parametrize("name", MOVES_WITH_ITS_ROWS)
def test_the_result_moves_with_the_rows(name: str) -> None:
    v, by = rows(), torch.arange(6.0, dtype=torch.float64)
    assert torch.allclose(aggregate(name, v + by), aggregate(name, v) + by, atol=1e-6)


@pytest.mark.parametrize("name", IS_MEAN_WITHOUT_FAULTS)
def test_without_faults_it_is_the_mean(name: str) -> None:
    v = rows()
    assert torch.allclose(aggregate(name, v, f=0), v.mean(dim=0), atol=1e-12)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_equal_rows_are_their_own_aggregate(name: str) -> None:
    v = rows(1).expand(N, -1)
    assert torch.allclose(aggregate(name, v), v[0], atol=1e-9)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_input_is_left_alone_and_the_type_kept(name: str) -> None:
    v = rows().float()
    before, weights = v.clone(), torch.ones(N)
    out = build(AGGREGATORS, name, F)(v, weights)
    assert torch.equal(v, before) and torch.equal(weights, torch.ones(N))
    assert out.dtype == torch.float32 and out.shape == (6,)
    out += 1.0
    assert torch.equal(v, before)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_f_rows_far_away_or_not_finite_leave_it_near_the_honest_ones(name: str, bad: float) -> None:
    v = rows()
    v[5], v[11] = bad, bad
    honest = v[[i for i in range(N) if i not in (5, 11)]]
    assert float((aggregate(name, v) - honest.mean(dim=0)).norm()) <= float((honest - honest.mean(0)).norm(dim=1).max())


def _kappa(name: str, n: int, f: int) -> float:
    """|out - mean of honest|^2 over their mean squared distance to it is at most this (arXiv:2302.01772, table 1)."""
    spare = 1 + f / (n - 2 * f)
    known = {
        "trimmed_mean": 6 * f / (n - 2 * f) * spare,
        "krum": 6 * spare,
        "median": 4 * spare**2,
        "geometric_median": 4 * spare**2,
    }
    return known.get(name, float(n * n))  # of the others only that something bounds them


BAD = [torch.nan, torch.inf, -torch.inf, 1e300, -1e300, 1e155, 1e30, -1e9, 3.0, 0.0, 1e-300]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([name for name in AGGREGATORS if name not in ("mean", "centered_clipping")]),
    first=st.sampled_from([None, "nnm"]),
    f=st.integers(1, 2),
    more=st.integers(0, 3),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_f_rows_whatever_leave_it_as_near_the_honest_mean_as_the_theory_says(  # type: ignore[no-untyped-def]
    name: str, first: str | None, f: int, more: int, seed: int, data
) -> None:
    n = 4 * f + 3 + more  # as many as Bulyan needs
    v = rows(n, 3, seed)
    bad = data.draw(st.lists(st.integers(1, n - 1), min_size=f, max_size=f, unique=True))  # the pivot is honest
    for row in bad:
        v[row] = torch.tensor(data.draw(st.lists(st.sampled_from(BAD), min_size=3, max_size=3)), dtype=torch.float64)
    honest = v[[i for i in range(n) if i not in bad]]
    if first == "nnm" and name != "nna":  # a mixed pivot is no honest client's own
        v, _ = PRE_AGGREGATORS["nnm"](f=f)(v, torch.ones(n), np.random.default_rng(0))
    mean, kappa = honest.mean(dim=0), _kappa(name, n, f)
    if first == "nnm":
        kappa = max(kappa, 8 * f / (n - f) * (kappa + 1))  # the same table
    spread = float((honest - mean).square().sum(1).mean())
    assert float((aggregate(name, v, f) - mean).square().sum()) <= kappa * spread * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), data=st.data())
def test_centred_clipping_moves_by_tau_an_iteration_at_most(seed: int, data) -> None:  # type: ignore[no-untyped-def]
    v = rows(5, 3, seed)
    v[2] = torch.tensor(data.draw(st.lists(st.sampled_from(BAD), min_size=3, max_size=3)), dtype=torch.float64)
    out = AGGREGATORS["centered_clipping"](tau=0.5, iterations=3)(v, torch.ones(5))
    assert float(out.norm()) <= 1.5 + 1e-9


@pytest.mark.parametrize("name", [n for n in ROBUST if n not in ("median", "geometric_median")])
def test_too_many_faults_are_refused_with_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*f=3.*n=6"):
        aggregate(name, rows(6), f=3)
    with pytest.raises(ValueError, match=rf"{name}\.f must be"):
        build(AGGREGATORS, name, -1)


@pytest.mark.parametrize("name", [n for n in AGGREGATORS if n != "mean"])
def test_only_the_mean_can_be_folded_and_only_it_believes_weights(name: str) -> None:
    rule, v = build(AGGREGATORS, name, F), rows()
    assert AGGREGATORS["mean"].foldable and not rule.foldable
    assert torch.equal(rule(v, torch.arange(1.0, N + 1)), rule(v, torch.ones(N)))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(3, 12), entries=st.integers(1, 6), seed=st.integers(0, 2**16), name=st.sampled_from(list(AGGREGATORS))
)
def test_any_shape_gives_a_vector_within_the_box_of_the_rows(n: int, entries: int, seed: int, name: str) -> None:
    v = rows(n, entries, seed)
    f = max(0, (n - 3) // 4)
    out = aggregate(name, v, f)
    assert bool((out <= v.amax(dim=0) + 1e-9).all() and (out >= v.amin(dim=0) - 1e-9).all())


@pytest.mark.parametrize("name", PRE_AGGREGATORS)
def test_preparation_leaves_its_input_alone_and_repeats_itself(name: str) -> None:
    v, weights = rows().float(), torch.rand(N)
    before, before_weights = v.clone(), weights.clone()
    rule = build(PRE_AGGREGATORS, name, F)
    out, w = rule(v, weights, np.random.default_rng(0))
    again, _ = rule(v, weights, np.random.default_rng(0))
    assert torch.equal(v, before) and torch.equal(weights, before_weights) and torch.equal(out, again)
    assert out.dtype == torch.float32 and len(out) == len(w)


@pytest.mark.parametrize("name", ["nnm", "bucketing", "arc"])
def test_preparation_without_faults_and_a_mean_is_the_mean(name: str) -> None:
    v = rows()
    rule = PRE_AGGREGATORS[name](size=3) if name == "bucketing" else PRE_AGGREGATORS[name](f=0)
    out, w = rule(v, torch.ones(N, dtype=torch.float64), np.random.default_rng(0))
    assert torch.allclose(AGGREGATORS["mean"]()(out, w), v.mean(dim=0), atol=1e-12)


@pytest.mark.parametrize("name", ["nnm", "clipping", "arc"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_prepared_rows_with_one_bad_one_keep_a_robust_rule_sane(name: str, bad: float) -> None:
    v = rows()
    v[4] = bad
    out, w = build(PRE_AGGREGATORS, name, F)(v, torch.ones(N), np.random.default_rng(0))
    assert bool(aggregate("trimmed_mean", out).isfinite().all())
