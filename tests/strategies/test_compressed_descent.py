"""EF21, EF21-BC, DIANA and MARINA: twins, exact limits, what their estimates are means of, and bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.sparsify import Identity, RandK, TopK
from fedsim.params import Layout
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.links import Downlink
from fedsim.strategies.centralised import Centralised
from fedsim.strategies.diana import Diana
from fedsim.strategies.ef21 import EF21
from fedsim.strategies.ef21_bc import EF21BC
from fedsim.strategies.marina import Marina
from fedsim.tasks.models import logistic
from tests.build import Play, drawn, local_sgd, play, quadratic, saddle
from tests.reference.clients import Formulas
from tests.reference.compressed import diana, ef21, ef21_bc, first_q, keyed, marina, power_sgd
from tests.reference.saddle import top
from tests.strategies.tasks import images, noisy

RAND, TOP = RandK(k=2), TopK(k=2)
SLOWING = {"name": "sgd", "lr": 0.2, "schedule": {"name": "exponential", "gamma": 0.8}}
KINDS: list[tuple[type, dict[str, Any]]] = [
    (EF21, {"compressor": TOP}),
    (EF21BC, {"compressor": TOP, "server_compressor": TopK(k=4)}),
    (Diana, {"compressor": RAND}),
    (Marina, {"compressor": RAND}),
]
every = pytest.mark.parametrize("kind, fields", KINDS, ids=[kind.__name__ for kind, _ in KINDS])


# Twins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 2])
def test_ef21_equals_its_twin(size: int | None) -> None:
    task, twin = noisy(steps=1)
    got = play(task, EF21(compressor=TOP, cohort_size=size, local=local_sgd(task, 0.1)), 12, width=2)
    expected = ef21(twin, task.x0, 12, eta=0.1, compress=top(2), size=size)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_ef21_bc_equals_its_twin() -> None:
    task, twin = noisy(steps=1)
    strategy = EF21BC(compressor=TOP, server_compressor=TopK(k=1), local=local_sgd(task, 0.1))
    expected = ef21_bc(twin, task.x0, 12, eta=0.1, compress=top(2), compress_server=top(1))
    torch.testing.assert_close(play(task, strategy, 12, width=2), expected, rtol=0, atol=1e-12)


def test_ef21_bc_with_powersgd_both_ways_equals_its_twin() -> None:
    task, rule = drawn(4, 12), PowerSGD(rank=1, layout=Layout.of({"w": (4, 3)}))
    strategy = EF21BC(compressor=rule, server_compressor=rule, local=local_sgd(task, 0.1))
    up, down = (power_sgd(4, 3, rank=1, first=first_q(3)) for _ in range(2))
    twin = Formulas(task.a, task.b, 1)
    expected = ef21_bc(twin, task.x0, 30, eta=0.1, compress=up, compress_server=down)
    torch.testing.assert_close(play(task, strategy, 30, width=2), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size, alpha", [(None, None), (2, None), (None, 0.3)])
def test_diana_equals_its_twin(size: int | None, alpha: float | None) -> None:
    task, twin = noisy(steps=1)
    strategy = Diana(compressor=RAND, alpha=alpha, cohort_size=size, local=local_sgd(task, 0.1))  # omega = 3/2 - 1
    expected = diana(twin, task.x0, 12, eta=0.1, alpha=alpha or 2 / 3, compress=keyed(RAND), size=size)
    torch.testing.assert_close(play(task, strategy, 12, width=2), expected, rtol=0, atol=1e-12)


def test_marina_equals_its_twin() -> None:
    task = drawn(5, 3)
    strategy = Marina(compressor=RAND, p=0.3, local=local_sgd(task, 0.1))
    expected = marina(Formulas(task.a, task.b, 1), task.x0, 12, eta=0.1, p=0.3, compress=keyed(RAND))
    torch.testing.assert_close(play(task, strategy, 12, width=2), expected, rtol=0, atol=1e-12)


def test_marina_on_minibatches_equals_a_plain_loop_of_autograd() -> None:
    task, twin = images(logistic, [6, 9, 5], 4, steps=1)
    strategy = Marina(compressor=RandK(k=200), p=0.4, local=local_sgd(task, 0.2, steps=1, batch_size=4))
    expected = marina(twin, task.x0, 5, eta=0.2, p=0.4, compress=keyed(RandK(k=200)))
    torch.testing.assert_close(play(task, strategy, 5, width=2), expected, rtol=1e-4, atol=1e-5)


# Limits ----------------------------------------------------------------------------------------------------------


@every
def test_clients_that_disagree_are_no_obstacle(kind: type, fields: dict[str, Any]) -> None:
    task = drawn(4, 10)  # DCGD and EF14 stall here, see test_compressed_links
    x = play(task, kind(local=local_sgd(task, 0.1), **fields), 400)[-1]
    assert float((x - task.solution()).norm()) < 1e-12


@pytest.mark.parametrize("kind, fields", [*KINDS, (Centralised, {})])
def test_without_compression_it_is_gradient_descent(kind: type, fields: dict[str, Any]) -> None:
    task, x, path = drawn(4, 10), torch.ones(10, dtype=torch.float64), []
    for r in range(8):
        x = x - 0.5 * 0.2 * 0.8**r * (task.a * (x - task.b)).mean(0)
        path.append(x)
    whole = dict.fromkeys(fields, Identity())
    got = play(task, kind(server_lr=0.5, local=local_sgd(task, optimizer=SLOWING), **whole), 8)
    torch.testing.assert_close(got, torch.stack(path), rtol=0, atol=1e-12)


@every
def test_a_strongly_monotone_saddle_point_is_found(kind: type, fields: dict[str, Any]) -> None:
    task = saddle(5, 4, lam=2.0)
    x = play(task, kind(local=local_sgd(task, 0.1), **fields), 100)[-1]
    assert float((x - task.solution()).norm()) < 1e-5


def test_a_compressed_downlink_leaves_the_limit_of_ef21_where_it_is() -> None:
    task = drawn(4, 10)
    strategy = EF21(compressor=TOP, local=local_sgd(task, 0.1))
    x = play(task, strategy, 300, downlink=Downlink(compressor=TOP, seed=0))[-1]
    assert float((x - task.solution()).norm()) < 1e-10


def test_one_client_walks_as_worked_out() -> None:
    # f = (4 x^2 + y^2) / 2 from (1, 1), Top-1, eta = 1/2: g = (4, 0), x = (-1, 1); then C(-4 - 4, 1 - 0) = (-8, 0),
    # g = (-4, 0), x = (1, 1); so the flat direction never travels
    task = quadratic([[4.0, 1.0]], [[0.0, 0.0]], [1.0, 1.0])
    path = play(task, EF21(compressor=TopK(k=1), local=local_sgd(task, 0.5)), 4)
    assert path.tolist() == [[-1, 1], [1, 1], [-1, 1], [1, 1]]


# Means of what clients keep --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, name", [(EF21, "g"), (Diana, "h")])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_estimate_is_the_mean_of_all_clients_rows(kind: type, name: str, dropout: float) -> None:
    task, _ = noisy(steps=1)
    absence = Absence(dropout=Dropout(probability=dropout))
    strategy = kind(compressor=RAND, cohort_size=3, local=local_sgd(task, 0.1))
    play, fewest = Play.start(task, strategy, absence=absence), 3
    for _ in range(12):
        play.step()
        rows = play.fleet.memory.of(play.fleet.clients)[name]
        torch.testing.assert_close(getattr(play.state, name), rows.mean(0), rtol=0, atol=1e-13)
        fewest = min(fewest, int(play.seen["num_clients"]))
    assert (fewest < 3) == (dropout > 0)


def test_ef21_bc_clients_hold_what_the_server_holds() -> None:
    task, _ = noisy(steps=1)
    local = local_sgd(task, optimizer=SLOWING)
    play = Play.start(task, EF21BC(compressor=RAND, server_compressor=TOP, server_lr=0.5, local=local))
    for _ in range(6):
        play.step()
        kept = play.fleet.memory.of(play.fleet.clients)
        for value, name in ((play.state.x, "x"), (play.state.v, "v")):
            assert torch.equal(kept[name], value.expand(5, -1)), name
        torch.testing.assert_close(play.state.g, kept["g"].mean(0), rtol=0, atol=1e-13)


# Bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EF21, Diana])
def test_a_round_costs_packets_up_and_models_down(kind: type) -> None:
    task = drawn(4, 10)
    play = Play.start(task, kind(compressor=RAND, cohort_size=3, local=local_sgd(task, 0.1)))
    play.path(5)
    assert play.fleet.ledger.bits_up == 5 * 3 * 2 * (32 + 4)  # an index of 10 entries takes 4 bits
    assert play.fleet.ledger.bits_down == 5 * 3 * 320


def test_ef21_bc_costs_packets_both_ways_but_for_the_start() -> None:
    task = drawn(4, 10)
    strategy = EF21BC(compressor=RAND, server_compressor=TopK(k=3), local=local_sgd(task, 0.1))
    play = Play.start(task, strategy)
    play.path(5)
    assert play.fleet.ledger.bits_up == 5 * 4 * 2 * (32 + 4)
    assert play.fleet.ledger.bits_down == 4 * (320 + 5 * 3 * (32 + 4))


def test_marina_costs_whole_gradients_where_its_coin_falls() -> None:
    task = drawn(4, 10)
    play = Play.start(task, Marina(compressor=RAND, p=0.4, local=local_sgd(task, 0.1)))
    whole = sum(play.step()["whole"] for _ in range(20))
    assert 1 < whole < 20
    assert play.fleet.ledger.bits_up == 4 * (whole * 320 + (20 - whole) * 2 * (32 + 4))
    assert play.fleet.ledger.bits_down == 4 * 20 * 320
    assert play.fleet.now == pytest.approx(0.01 * (whole + 2 * (20 - whole)))  # a change is two gradients


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        (Diana, {"compressor": TOP}, "compressor .*TopK.*biased.*or strategy ef21"),
        (Marina, {"compressor": TOP}, "compressor .*TopK.*biased.*or strategy ef21"),
        (Diana, {"alpha": 0.0}, r"alpha .* must lie in \(0, 1\], got 0"),
        (Marina, {"p": 1.5}, r"p, .* must lie in \(0, 1\], got 1.5"),
    ],
)
def test_what_cannot_work_is_refused(kind: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(local=local_sgd(drawn(4, 3)), **fields)
