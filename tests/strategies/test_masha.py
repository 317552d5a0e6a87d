"""MASHA1, MASHA2 and extragradient: twins, identities, linear convergence, and bits to a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.quantize import QSGD, Natural
from fedsim.compress.sparsify import Identity, RandK, TopK
from fedsim.params import Layout
from fedsim.sim.links import Uplink
from fedsim.strategies.extragradient import Extragradient
from fedsim.strategies.masha1 import Masha1
from fedsim.strategies.masha2 import Masha2
from fedsim.strategies.optimistic_gradient import OptimisticGradient
from fedsim.streams import Streams
from fedsim.tasks.bilinear import BilinearTask
from fedsim.tasks.models import logistic
from tests.build import Play, play, saddle
from tests.reference.clients import Operators
from tests.reference.compressed import first_q, keyed, power_sgd
from tests.reference.saddle import extragradient, masha1, masha2, optimistic_gradient, top
from tests.strategies.tasks import images


def _twin(task: BilinearTask) -> Operators:
    return Operators(task.matrix, task.a, task.b, task.lam)


# Twins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, plain", [(Extragradient, extragradient), (OptimisticGradient, optimistic_gradient)])
def test_uncompressed_methods_equal_their_twins(kind: type, plain: Any) -> None:
    task = saddle(4, 6, lam=0.1)
    expected = plain(_twin(task), task.init(0), 20, lr=0.2)
    torch.testing.assert_close(play(task, kind(lr=0.2), 20, width=3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compressor", [Identity(), RandK(k=3), QSGD(levels=4), Natural()])
def test_masha1_equals_its_twin_with_compression_both_ways(compressor: Any) -> None:
    task = saddle(4, 6)
    strategy = Masha1(lr=0.05, p=0.3, compressor=compressor, server_compressor=RandK(k=8))
    ways: dict[str, Any] = {
        "compress": keyed(compressor),
        "compress_server": lambda v, key, iteration: keyed(RandK(k=8), key)(v, -1, iteration),
    }
    expected = masha1(_twin(task), task.init(0), 25, lr=0.05, p=0.3, **ways)
    torch.testing.assert_close(play(task, strategy, 25, width=3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k, server_k", [(12, 12), (2, 12), (2, 5)])
def test_masha2_equals_its_twin_with_top_k_both_ways(k: int, server_k: int) -> None:
    task = saddle(4, 6)
    strategy = Masha2(lr=0.05, p=0.3, compressor=TopK(k=k), server_compressor=TopK(k=server_k))
    expected = masha2(_twin(task), task.init(0), 25, lr=0.05, p=0.3, compress=top(k), compress_server=top(server_k))
    torch.testing.assert_close(play(task, strategy, 25, width=3), expected, rtol=0, atol=1e-12)


def test_masha2_equals_its_twin_with_powersgd_both_ways() -> None:
    task, rule = saddle(4, 6), PowerSGD(rank=1, layout=Layout.of({"w": (4, 3)}))
    up, down = (power_sgd(4, 3, rank=1, first=first_q(3)) for _ in range(2))
    expected = masha2(_twin(task), task.init(0), 25, lr=0.05, p=0.3, compress=up, compress_server=down)
    strategy = Masha2(lr=0.05, p=0.3, compressor=rule, server_compressor=rule)
    torch.testing.assert_close(play(task, strategy, 25, width=3), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size, minibatch", [(2, False), (None, True), (2, True)], ids=["pp", "vr", "both"])
def test_a_part_of_the_devices_and_of_their_samples_equals_the_twin(size: int | None, minibatch: bool) -> None:
    task, twin = images(logistic, [6, 9, 5], 4, steps=1)
    given: dict[str, Any] = {"cohort_size": size, "batch_size": 4 if minibatch else None, "lr": 0.2, "p": 0.3}
    path: dict[str, Any] = {"size": size, "minibatch": minibatch, "lr": 0.2, "p": 0.3}
    rand, biased = RandK(k=200), top(200)
    one = play(task, Masha1(compressor=rand, **given), 4, width=2)
    torch.testing.assert_close(one, masha1(twin, task.x0, 4, compress=keyed(rand), **path), rtol=1e-4, atol=1e-5)
    two = play(task, Masha2(compressor=TopK(k=200), **given), 4, width=2)
    torch.testing.assert_close(two, masha2(twin, task.x0, 4, compress=biased, **path), rtol=1e-4, atol=1e-5)


# Identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Masha1, Masha2])
def test_with_certain_refresh_and_no_compression_it_is_extragradient(kind: type) -> None:
    task = saddle(4, 6)
    ours = play(task, kind(lr=0.2, p=1.0), 30)
    torch.testing.assert_close(ours, play(task, Extragradient(lr=0.2), 30), rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_without_compression_both_forms_are_the_same(p: float) -> None:
    task = saddle(4, 6)
    one, two = (play(task, kind(lr=0.1, p=p), 40) for kind in (Masha1, Masha2))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Masha1, Masha2])
def test_all_devices_as_the_cohort_change_no_bit(kind: type) -> None:
    task = saddle(4, 6)
    compressor = RandK(k=3)
    all_of_them = play(task, kind(lr=0.1, p=0.4, cohort_size=4, compressor=compressor), 20)
    assert torch.equal(all_of_them, play(task, kind(lr=0.1, p=0.4, compressor=compressor), 20))


@pytest.mark.parametrize("kind, compressor", [(Masha1, RandK(k=100)), (Masha2, TopK(k=100))])
def test_a_minibatch_of_all_samples_is_the_whole_operator(kind: type, compressor: Any) -> None:
    task, _ = images(logistic, [6, 9, 5], None, steps=1)
    paths = [play(task, kind(lr=0.2, p=0.3, compressor=compressor, batch_size=size), 8) for size in (None, 9)]
    torch.testing.assert_close(paths[0], paths[1], rtol=0, atol=1e-5)  # samples in another order


def test_a_part_of_the_devices_is_enough_to_converge_linearly() -> None:
    task = saddle(10, 10, low=1.5)
    strategy = Masha1(lr=_theory_step(task, 0.1, q=2), p=0.1, cohort_size=3, compressor=RandK(k=10))
    away = _away(task, play(task, strategy, 600))
    assert all(float(away[i + 199]) < 0.4 * float(away[i]) for i in (0, 200, 400))


def test_errors_of_devices_that_are_not_asked_stay() -> None:
    task = saddle(4, 6)
    play = Play.start(task, Masha2(lr=0.1, p=0.2, cohort_size=1, compressor=TopK(k=1)))
    play.path(3)
    for _ in range(5):
        before = play.fleet.memory.of(play.fleet.clients)["e"].clone()
        play.step()
        changed = (play.fleet.memory.of(play.fleet.clients)["e"] != before).any(1)
        assert int(changed.sum()) == 1


def test_a_single_device_without_compression_depends_on_the_coins_alone() -> None:
    task = saddle(1, 5)
    first, again, other = (play(task, Masha1(lr=0.1, p=0.4), 20, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_coins_do_not_depend_on_the_compressor() -> None:
    task, coins = saddle(4, 6), []
    for compressor in (Identity(), RandK(k=2), QSGD(levels=2)):
        play = Play.start(task, Masha1(lr=0.01, p=0.4, compressor=compressor))
        coins.append([play.step()["refresh"] for _ in range(25)])
    assert coins[0] == coins[1] == coins[2] and 0 < sum(coins[0]) < 25


def test_devices_and_server_draw_different_entries() -> None:
    task = saddle(3, 50)
    play = Play.start(task, Masha1(lr=0.01, compressor=RandK(k=10)))
    play.step()
    streams = Streams(0, torch.arange(3), torch.full((3,), 2))
    index = RandK(k=10).encode(torch.ones(3, 100), streams).payload["index"]
    assert len({tuple(row) for row in index.tolist()}) == 3


def test_the_server_compressor_follows_the_seed() -> None:
    task = saddle(3, 6)
    strategy = Masha1(lr=0.05, p=1e-9, server_compressor=RandK(k=2))  # coins never fall: nothing else is random
    assert not torch.equal(play(task, strategy, 3, seed=0), play(task, strategy, 3, seed=1))


def test_clients_hold_what_the_server_holds() -> None:
    task = saddle(4, 6)
    strategy = Masha2(lr=0.05, p=0.3, compressor=TopK(k=2), server_compressor=TopK(k=3))
    play = Play.start(task, strategy)
    for _ in range(10):
        play.step()
        kept = play.fleet.memory.of(play.fleet.clients)
        for name, value in (("z", play.state.x), ("w", play.state.w), ("fw", play.state.fw)):
            assert torch.equal(kept[name], value.expand(4, -1)), name


def test_error_feedback_loses_nothing() -> None:
    # with p tiny the reference stays, so that the sum of what was sent and what is kept is the sum of all messages
    task = saddle(3, 4)
    strategy = Masha2(lr=0.1, p=1e-9, compressor=TopK(k=1))
    play = Play.start(task, strategy)
    play.step()
    f_w = torch.stack([_twin(task).full(m, play.state.w) for m in range(3)])
    z, total = torch.zeros(8, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.float64)
    moved = torch.zeros(8, dtype=torch.float64)
    points = [play.state.x, *play.path(9)]
    for after in points:
        anchor = (1 - 1e-9) * z + 1e-9 * play.state.w
        half = anchor - 0.1 * play.state.fw
        total += 0.1 * (torch.stack([_twin(task).full(m, half) for m in range(3)]) - f_w)
        moved += anchor - 0.1 * play.state.fw - after
        z = after
    errors = play.fleet.memory.of(torch.arange(3))["e"]
    torch.testing.assert_close(moved + errors.mean(0), total.mean(0), rtol=0, atol=1e-12)


# Convergence -----------------------------------------------------------------------------------------------------


def _away(task: BilinearTask, path: Tensor) -> Tensor:
    return (path - task.solution()).norm(dim=1)


def _theory_step(task: BilinearTask, p: float, q: float) -> float:
    """sqrt(p) / (2 C_q), C_q^2 = 1/M^2 sum_m (q L_m^2 + (M - 1) Lt^2), all L_m = 2 here."""
    m, lipschitz = len(task.a), 2.0
    c_q = ((q * m + (m - 1) * m) * lipschitz**2 / m**2) ** 0.5
    return p**0.5 / (2 * c_q)


@pytest.mark.parametrize("p, k, factor", [(0.5, 10, 4e-3), (0.1, 2, 0.3)])
def test_converges_linearly_at_the_theoretical_step(p: float, k: int, factor: float) -> None:
    task = saddle(10, 10, low=1.5)
    strategy = Masha1(lr=_theory_step(task, p, q=20 / k), p=p, compressor=RandK(k=k))
    assert strategy.proven(task.constants, 20) == pytest.approx((strategy.lr, strategy.lr))
    away = _away(task, play(task, strategy, 600))
    assert all(float(away[i + 199]) < factor * float(away[i]) for i in (0, 200, 400))


@pytest.mark.parametrize("server, factor", [(Identity(), 0.4), (TopK(fraction=0.1), 0.6)])
def test_error_feedback_converges_linearly_with_top_k(server: Any, factor: float) -> None:
    task = saddle(10, 10, low=1.5)
    strategy = Masha2(lr=0.05, p=0.1, compressor=TopK(fraction=0.1), server_compressor=server)
    away = _away(task, play(task, strategy, 600))
    assert all(float(away[i + 199]) < factor * float(away[i]) for i in (0, 200, 400))


def test_top_k_without_error_feedback_diverges_where_masha2_converges() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Careless(Masha1):
        def __post_init__(self) -> None:
            """Take any compressor."""

    task = saddle(10, 10, low=1.5)
    careless = Careless(lr=0.05, p=0.1, compressor=TopK(fraction=0.1))
    away = _away(task, play(task, careless, 400))
    assert float(away[-1]) > 10 * float(away[0])


def test_a_reference_that_is_never_refreshed_diverges_on_a_bilinear_problem() -> None:
    task = saddle(5, 5)
    away = _away(task, play(task, Masha1(lr=0.3, p=1e-12), 60))
    assert float(away[-1]) > 10 * float(away[0])


@pytest.mark.parametrize("lr, fails", [(0.02, "stalls"), (0.1, "diverges"), (0.3, "diverges")])
def test_compressed_extragradient_does_not_converge(lr: float, fails: str) -> None:
    task = saddle(25, 50)
    away = _away(task, play(task, Extragradient(lr=lr), 300, uplink=Uplink(compressor=RandK(k=10))))
    if fails == "diverges":
        assert float(away[-1]) > 3 * float(away[0])
    assert float(away.min()) > 0.1


def _bits_to(task: BilinearTask, strategy: Any, target: float, limit: int) -> tuple[int, float]:
    """(iterations, bits up of one device) until |z - z*| is as small as the target."""
    play, star = Play.start(task, strategy), task.solution()
    for k in range(limit):
        play.step()
        if float((play.state.x - star).norm()) <= target:
            return k + 1, play.fleet.ledger.bits_up / len(task.a)
    raise AssertionError(f"{strategy} did not reach {target} in {limit} iterations")


def test_masha1_needs_less_than_two_thirds_of_the_bits_of_the_best_extragradient() -> None:
    task = saddle(25, 50)
    runs = [_bits_to(task, Extragradient(lr=lr), 1e-3, 100) for lr in (0.5, 0.55, 0.6)]
    assert all(bits == iterations * 2 * 32 * 100 for iterations, bits in runs)
    compressed = _bits_to(task, Masha1(lr=0.18, p=0.1, compressor=RandK(k=10)), 1e-3, 400)[1]
    assert compressed * 1.5 <= min(bits for _, bits in runs)


def test_masha2_needs_no_more_bits_than_extragradient() -> None:
    task = saddle(25, 50)
    plain = _bits_to(task, Extragradient(lr=0.55), 1e-3, 100)[1]
    assert _bits_to(task, Masha2(lr=0.15, p=0.1, compressor=TopK(k=20)), 1e-3, 400)[1] <= plain


def test_with_strong_monotonicity_masha1_beats_extragradient_at_one_over_l_but_not_at_its_best() -> None:
    # The mean of the rotated A_m is smoother than any A_m, so that extragradient may take more than 1 / L_m = 0.5;
    # then it needs few iterations, and compression no longer pays.
    task = saddle(25, 50, lam=0.5)
    compressed = _bits_to(task, Masha1(lr=0.15, p=0.1, compressor=RandK(k=5)), 1e-3, 300)[1]
    at_theory, best = (_bits_to(task, Extragradient(lr=lr), 1e-3, 100)[1] for lr in (0.5, 0.7))
    assert best < compressed < at_theory


def test_bits_of_a_run_are_those_of_packets_refreshes_and_coins() -> None:
    task, rounds = saddle(5, 50), 30
    play = Play.start(task, Masha1(lr=0.1, p=0.3, compressor=RandK(k=10), server_compressor=RandK(k=20)))
    refreshes = 1 + sum(play.step()["refresh"] for _ in range(rounds))
    up, down = 10 * (32 + 7), 20 * (32 + 7) + 1  # indices of 100 entries take 7 bits, the coin one
    start = 3200  # z^0 itself
    assert play.fleet.ledger.bits_up == 5 * (rounds * up + refreshes * 3200)
    assert play.fleet.ledger.bits_down == 5 * (start + rounds * down + refreshes * 3200)


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["compressor", "server_compressor"])
def test_masha1_refuses_a_biased_compressor_and_names_the_way_out(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} .*TopK.*use an unbiased one .* or strategy masha2"):
        Masha1(lr=0.1, **{key: TopK(k=1)})  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Masha1, Masha2])
@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"p": 0.0}, {"p": 1.5}, {"batch_size": 0}, {"cohort_size": 0}])
def test_steps_and_chances_out_of_range_are_refused(make: type, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive|chance of a refresh|_size must be at least 1"):
        make(**{"lr": 0.1, **bad})
    with pytest.raises(ValueError, match="lr must be positive"):
        replace(Extragradient(lr=1.0), lr=-1.0)
