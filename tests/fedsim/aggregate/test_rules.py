"""The fixed example of five rows, and each rule's own claims."""

import itertools

import numpy as np
import pytest
import torch

from fedsim.aggregate.centres import CenteredClipping, GeometricMedian
from fedsim.aggregate.coordinatewise import Bulyan, MeaMed, Median, Phocas, TrimmedMean
from fedsim.aggregate.mean import Mean
from fedsim.aggregate.neighbours import NNA, Krum, MultiKrum
from fedsim.aggregate.prepare import ARC, NNM, Bucketing, Clipping
from fedsim.aggregate.subsets import CAF, MDA, MVA, SMEA

V = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [10.0, -10.0]], dtype=torch.float64)
ONES = torch.ones(5)
EXAMPLE = [
    (Mean(), [2.4, -1.6]),
    (Median(), [1.0, 0.0]),
    (TrimmedMean(f=1), [2 / 3, 1 / 3]),
    (Krum(f=1), [0.0, 0.0]),
    (Krum(f=1, neighbours="n-f-2"), [0.0, 0.0]),
    (MultiKrum(f=1), [0.5, 0.5]),
    (NNA(f=1), [0.5, 0.5]),
    (NNA(f=1, pivot=4), [3.0, -2.25]),
    (MDA(f=1), [0.5, 0.5]),
    (MVA(f=1), [0.5, 0.5]),
    (SMEA(f=1), [0.5, 0.5]),
    (MeaMed(f=1), [0.5, 0.5]),
    (Phocas(f=1), [0.5, 0.5]),
    (GeometricMedian(iterations=3), [0.498550, 0.207235]),
    (GeometricMedian(), [0.780525, 0.204675]),
    (CenteredClipping(tau=2.0), [0.682843, 0.117157]),
]


@pytest.mark.parametrize(("rule", "expected"), EXAMPLE, ids=lambda x: str(x) if not isinstance(x, list) else "")
def test_the_fixed_example(rule, expected: list[float]) -> None:  # type: ignore[no-untyped-def]
    assert rule(V, ONES).tolist() == pytest.approx(expected, abs=1e-6)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_fixed_example_of_preparation() -> None:
    mixed, weights = NNM(f=1)(V, ONES, rng())
    assert mixed.tolist() == [[0.5, 0.5]] * 4 + [[3.0, -2.25]] and weights.tolist() == [1.0] * 5
    clipped, _ = ARC(f=1)(V, ONES, rng())
    assert torch.equal(clipped[:4], V[:4])
    assert clipped[4].tolist() == pytest.approx([1.0, -1.0])  # length 1.41421
    short, _ = Clipping(norm=2.0)(V, ONES, rng())
    assert torch.equal(short[:4], V[:4]) and float(short[4].norm()) == pytest.approx(2.0)


def test_the_geometric_median_is_where_the_pulls_cancel() -> None:
    z = GeometricMedian()(V, ONES)  # no row is nearer than nu
    assert torch.allclose(((V - z) / (V - z).norm(dim=1, keepdim=True)).sum(dim=0), torch.zeros(2).double(), atol=1e-6)


def test_the_geometric_median_equals_weiszfeld_on_the_rows_themselves() -> None:
    v = 5.0 + torch.randn(9, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.zeros(40, dtype=torch.float64)
    for _ in range(6):
        pull = 1.0 / (v - z).norm(dim=1).clamp(min=0.1)
        z = pull @ v / pull.sum()
    assert torch.allclose(GeometricMedian(iterations=6, tol=0.0)(v, torch.ones(9)), z, atol=1e-10)


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert Median()(torch.tensor([[4.0], [1.0], [2.0], [9.0]]), torch.ones(4)).tolist() == [3.0]


def test_values_equally_near_the_median_are_taken_from_below() -> None:
    v = torch.tensor([[0.0], [1.0], [2.0]])
    assert MeaMed(f=1)(v, torch.ones(3)).tolist() == [0.5]


def test_centred_clipping_starts_where_it_is_told() -> None:
    start = torch.tensor([0.5, 0.5], dtype=torch.float64)
    far = V[4] - start
    expected = start + (V[:4] - start).sum(0) / 5 + far / far.norm() / 5
    assert torch.allclose(CenteredClipping(tau=1.0)(V, ONES, start), expected)


def test_krum_scores_the_only_row_there_is() -> None:
    assert Krum(f=0)(V[:1], ONES[:1]).tolist() == [0.0, 0.0]


def test_bulyan_equals_its_definition() -> None:
    g = torch.Generator().manual_seed(3)
    v = torch.randn(11, 6, generator=g, dtype=torch.float64)
    v[:2] += 20.0
    n, f, left, chosen = 11, 2, list(range(11)), []
    distances = (v[:, None] - v).square().sum(-1)
    for _ in range(n - 2 * f):
        d = distances[left][:, left].sort(dim=1).values[:, 1:]
        scores = d[:, : len(left) - f - 2].mean(dim=1)
        chosen.append(min(left, key=lambda i: (float(scores[left.index(i)]), float(distances[i].sum()))))
        left.remove(chosen[-1])
    rows = v[chosen]
    middle = rows.median(dim=0).values  # of 7
    nearest = (rows - middle).abs().argsort(dim=0)[: n - 4 * f]
    assert torch.allclose(Bulyan(f=2)(v, torch.ones(11)), rows.gather(0, nearest).mean(dim=0))
    with pytest.raises(ValueError, match="4f"):
        Bulyan(f=2)(v[:10], torch.ones(10))


def spread(rows: torch.Tensor) -> dict[str, float]:
    """Diameter, variance and top eigenvalue of a set of rows, straight from their definitions."""
    centred = rows - rows.mean(dim=0)
    return {
        "mda": float((rows[:, None] - rows).square().sum(-1).max()),
        "mva": float(centred.square().sum()),
        "smea": float(torch.linalg.eigvalsh(centred.T @ centred)[-1]),
    }


@pytest.mark.parametrize(("name", "cls"), [("mda", MDA), ("mva", MVA), ("smea", SMEA)])
@pytest.mark.parametrize(("n", "f"), [(5, 0), (7, 2), (9, 4), (10, 3)])
def test_rules_on_subsets_find_the_best_of_all_of_them(name: str, cls, n: int, f: int) -> None:  # type: ignore[no-untyped-def]
    v = torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    best = min(itertools.combinations(range(n), n - f), key=lambda s: spread(v[list(s)])[name])
    assert torch.allclose(cls(f=f)(v, torch.ones(n)), v[list(best)].mean(dim=0))


def test_mda_takes_the_first_set_of_equal_diameter() -> None:
    g = torch.Generator().manual_seed(1)
    for n, f in ((9, 2), (11, 5)):
        for _ in range(10):
            v = torch.randint(0, 4, (n, 2), generator=g).double()
            sets = itertools.combinations(range(n), n - f)
            best = min(sets, key=lambda s: (spread(v[list(s)])["mda"], s))
            assert torch.equal(MDA(f=f)(v, v), v[list(best)].mean(dim=0))


def test_too_many_subsets_are_refused_before_the_search() -> None:
    with pytest.raises(ValueError, match="smea would search 30045015 sets"):
        SMEA(f=10)(torch.randn(30, 2), torch.ones(30))


def test_caf_weighs_an_outlier_down() -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(20, 5, generator=g, dtype=torch.float64)
    v[:3] += 50.0
    honest = v[3:].mean(dim=0)
    assert float((CAF(f=3)(v, torch.ones(20)) - honest).norm()) < 0.2 * float((v.mean(dim=0) - honest).norm())


def test_buckets_hold_every_row_once() -> None:
    v = torch.eye(5)
    means, counts = Bucketing(size=2)(v, ONES, rng())
    assert sorted(counts.tolist()) == [1.0, 2.0, 2.0]
    assert torch.allclose(Mean()(means, counts), v.mean(dim=0))
    assert torch.equal(Bucketing(size=2)(v, ONES, rng())[0], means)


def test_arc_clips_whole_numbers_of_rows() -> None:
    v = torch.arange(1.0, 11.0)[:, None]  # 2 f (n - f) / n = 3.2: three rows
    assert ARC(f=2)(v, torch.ones(10), rng())[0].flatten().tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 7, 7, 7, 7])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMean(f=-1), "trimmed_mean.f"),
        (lambda: NNA(f=1, pivot=-1), "nna.pivot"),
        (lambda: NNA(f=1, pivot=5)(V, ONES), "pivot=5 is not one of the 5 rows"),
        (lambda: Krum(f=1, neighbours="n"), "krum.neighbours"),  # type: ignore[arg-type]
        (lambda: GeometricMedian(nu=0.0), "geometric_median.nu"),
        (lambda: GeometricMedian(iterations=0), "geometric_median.iterations"),
        (lambda: GeometricMedian(tol=-1.0), "geometric_median.tol"),
        (lambda: CenteredClipping(tau=0.0), "centered_clipping.tau"),
        (lambda: CenteredClipping(iterations=0), "centered_clipping.iterations"),
        (lambda: Bucketing(size=0), "bucketing.size"),
        (lambda: Clipping(norm=-1.0), "clipping.norm"),
        (lambda: NNM(f=5)(V, ONES, rng()), "nnm needs more rows"),
        (lambda: ARC(f=6)(V, ONES, rng()), "arc needs at least"),
        (lambda: Mean(weights="size"), "mean.weights"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
