"""Every rule, pre-aggregator and attack that ByzFL has gives what ours gives: at random, with ties and at extremes.

But for CAF, which is another one there (see fedsim/aggregate/subsets.py), and noise, which is drawn.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS
from fedsim.clients.byzantine import ATTACKS
from fedsim.sim.byzantine import Knowledge
from tests.build import streams

N, F = 10, 2
CASES = ["random", "twins", "far", "tiny", "huge", "one of them"]


@pytest.fixture(scope="module")
def byzfl() -> Iterator[types.ModuleType]:
    """The library; it imports torchvision for a part that is not used here."""
    with pytest.MonkeyPatch.context() as patch:
        if "torchvision" not in sys.modules:
            for part in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models"):
                patch.setitem(sys.modules, part, MagicMock())
        yield pytest.importorskip("byzfl")


def rows(case: str, entries: int = 7) -> Tensor:
    v = torch.randn(N, entries, generator=torch.Generator().manual_seed(CASES.index(case)), dtype=torch.float64)
    v[:2] += 3.0
    if case == "twins":
        v[1], v[5], v[9] = v[0], v[4], v[4]  # equal rows: whichever of them is taken, the result is the same
    if case == "far":
        v[3:5] *= 1e9
    scale = {"tiny": 1e-9, "huge": 1e9}.get(case, 1.0)
    return scale * (v if case != "one of them" else v[:1].expand(N, -1))


RULES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("mean", "Average", {}, {}),
    ("median", "Median", {}, {}),
    ("trimmed_mean", "TrMean", {"f": F}, {"f": F}),
    ("krum", "Krum", {"f": F}, {"f": F}),
    ("multi_krum", "MultiKrum", {"f": F}, {"f": F}),
    ("geometric_median", "GeometricMedian", {"iterations": 3}, {"nu": 0.1, "T": 3}),
    ("centered_clipping", "CenteredClipping", {"tau": 1.5, "iterations": 4}, {"tau": 1.5, "L": 4}),
    ("nna", "MoNNA", {"f": F, "pivot": 3}, {"f": F, "idx": 3}),
    ("mda", "MDA", {"f": F}, {"f": F}),
    ("meamed", "Meamed", {"f": F}, {"f": F}),
    ("smea", "SMEA", {"f": F}, {"f": F}),
]
PREPARED: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("nnm", "NNM", {"f": F}, {"f": F}),
    ("arc", "ARC", {"f": F}, {"f": F}),
    ("clipping", "Clipping", {"norm": 1.5}, {"c": 1.5}),
    ("bucketing", "Bucketing", {"size": 3}, {"s": 3}),
]


def names(value: object) -> str:
    return value if isinstance(value, str) else ""


def near(theirs: Any, like: Tensor) -> Any:
    """What equals theirs but for rounding of numbers as large as those of `like`."""
    return pytest.approx(np.asarray(theirs), rel=1e-9, abs=1e-9 * float(like.abs().median()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "twin", "ours", "theirs"), RULES, ids=names)
def test_it_aggregates_alike(byzfl: Any, name: str, twin: str, ours: Any, theirs: Any, case: str) -> None:
    if name == "smea" and case == "one of them":
        pytest.skip("without a spread there is no top direction, and ByzFL divides zero by zero")
    # ByzFL's SMEA takes one power step from a random start, which finds the top direction where there is but one
    v = rows(case, 1 if name == "smea" else 7)
    got = AGGREGATORS[name](**ours)(v, torch.ones(N, dtype=torch.float64))
    assert got.numpy() == near(getattr(byzfl, twin)(**theirs)(v.numpy().copy()), v)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "twin", "ours", "theirs"), PREPARED, ids=names)
def test_it_prepares_alike(
    byzfl: Any, name: str, twin: str, ours: Any, theirs: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = rows(case)
    got, _ = PRE_AGGREGATORS[name](**ours)(v, torch.ones(N), np.random.default_rng(0))
    order = np.random.default_rng(0).permutation(N)
    monkeypatch.setattr(np.random, "permutation", lambda given: given[order])  # buckets of the same rows
    assert got.numpy() == near(getattr(byzfl, twin)(**theirs)(v.numpy().copy()), v)


LIES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("sign_flip", "SignFlipping", {}, {}),
    ("foe", "InnerProductManipulation", {"tau": 1.7}, {"tau": 1.7}),
    ("alie", "ALittleIsEnough", {"k": 0.7}, {"tau": 0.7}),
    ("mimic", "Mimic", {"target": 3}, {"epsilon": 3}),
    ("infinity", "Inf", {}, {}),
    ("label_flip", "LabelFlipping", {"pooled": True}, {}),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "twin", "ours", "theirs"), LIES, ids=names)
def test_it_lies_alike(byzfl: Any, name: str, twin: str, ours: Any, theirs: Any, case: str) -> None:
    v = rows(case)
    got = ATTACKS[name](**ours)(v, F, streams(F), Knowledge(own=v))  # the pooled vectors are ByzFL's argument
    expected = getattr(byzfl.attacks, twin)(**theirs)(v.numpy().copy())
    assert got.numpy() == near(np.tile(expected, (F, 1)), v)


@pytest.mark.parametrize("case", ["random", "twins", "tiny", "huge"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("rule", "twin"), [(r, t) for r, t, *_ in RULES[:6]], ids=names)
@pytest.mark.parametrize(("attack", "key"), [("alie", "k"), ("foe", "tau")])
def test_the_factor_that_is_sought_harms_as_much_at_least(
    byzfl: Any, attack: str, key: str, rule: str, twin: str, mixed: bool, case: str
) -> None:
    ours, theirs = next((o, t) for name, _, o, t in RULES if name == rule)
    v = rows(case)

    def made(sent: Tensor) -> Tensor:
        everyone, weights = torch.cat([v, sent]), torch.ones(N + F, dtype=torch.float64)
        if mixed:
            everyone, weights = PRE_AGGREGATORS["nnm"](f=F)(everyone, weights, np.random.default_rng(0))
        return AGGREGATORS[rule](**ours)(everyone, weights)

    sent = ATTACKS[attack](**{key: "optimised"})(v, F, streams(F), Knowledge(rule=made))
    kind = {"alie": "Optimal_ALittleIsEnough", "foe": "Optimal_InnerProductManipulation"}[attack]
    first = [byzfl.NNM(f=F)] if mixed else []
    seek = getattr(byzfl.attacks, kind)(agg=getattr(byzfl, twin)(**theirs), pre_agg_list=first, f=F)
    expected = torch.from_numpy(seek(v.numpy().copy())).expand(F, -1)
    harm, theirs_harm = (float((made(out) - v.mean(0)).norm()) for out in (sent, expected))
    assert harm >= theirs_harm * (1 - 1e-6)  # of our two searches one is theirs
