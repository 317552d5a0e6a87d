"""Gradient coding: exact gradients from whoever answers, and round clocks equal to their twins'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.clients.oracle import coded_gradient
from fedsim.config import ConfigError
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.byzantine import Byzantine
from fedsim.strategies import STRATEGIES
from fedsim.strategies.codes import Code
from fedsim.strategies.coding import Bursts
from fedsim.streams import Streams
from fedsim.tasks.models import MODELS
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Play, cohort, digits_task, drawn, quadratic, rows_of
from tests.reference import coding as twins

NUM = 8
SAMPLES = [11, 12, 13, 10, 15, 7, 0, 2]


@dataclass(frozen=True)
class Table:
    """The k-th job of client i takes table[i, k] seconds, and slope more for each step."""

    table: Tensor
    slope: float = 0.0
    random: bool = True

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        return self.table[streams.clients, streams.jobs] + self.slope * steps


def _delays(rounds: int, seed: int = 0, n: int = NUM, often: float = 0.12) -> Tensor:
    """[n, rounds]: about a second, and now and then 6 seconds or more for a while."""
    rng = np.random.default_rng(seed)
    slow, table = np.zeros(n, dtype=bool), np.zeros((n, rounds))
    for t in range(rounds):
        slow = np.where(slow, rng.random(n) < 0.4, rng.random(n) < often)
        table[:, t] = 1 + 0.5 * rng.random(n) + slow * (5 + rng.random(n))
    return torch.from_numpy(table)


def _task(dim: int = 3) -> QuadraticTask:
    task = drawn(NUM, dim)
    return quadratic(task.a, task.b, task.x0, num_examples=SAMPLES)


def _make(name: str, count: int = NUM, lr: float = 0.3, **fields: Any) -> Any:
    return STRATEGIES[name](count=count, lr=lr, **fields)


SCHEMES: dict[str, tuple[dict[str, Any], Any]] = {
    "uncoded": ({}, twins.Uncoded()),
    "gradient_coding": ({"s": 2}, twins.GC(2)),
    "sr_sgc": ({"B": 1, "W": 2, "lam": 4}, twins.SRSGC(1, 2, 4)),
    "sr_sgc, long": ({"B": 2, "W": 5, "lam": 5}, twins.SRSGC(2, 5, 5)),
    "m_sgc": ({"B": 1, "W": 2, "lam": 3}, twins.MSGC(1, 2, 3)),
    "m_sgc, long": ({"B": 2, "W": 4, "lam": 4}, twins.MSGC(2, 4, 4)),
    "m_sgc, all": ({"B": 2, "W": 3, "lam": NUM}, twins.MSGC(2, 3, NUM)),
}
every_scheme = pytest.mark.parametrize("name", SCHEMES)


def _of(name: str, **more: Any) -> Any:
    return _make(name.partition(",")[0], **{**SCHEMES[name][0], **more})


# Codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "s"), [(3, 1), (6, 2), (7, 3)])
def test_every_pattern_of_s_stragglers_decodes_and_none_of_more(n: int, s: int) -> None:
    code = Code("cyclic", n, s)
    support = (torch.arange(n)[:, None] + torch.arange(s + 1)) % n
    assert torch.equal(code.matrix != 0, torch.zeros(n, n, dtype=torch.bool).scatter(1, support, True))
    g = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for late in combinations(range(n), s):
        answered = torch.ones(n, dtype=torch.bool)
        answered[list(late)] = False
        sent = torch.where(answered[:, None], code.matrix @ g, torch.nan)[answered]
        a = code.decode(answered)
        torch.testing.assert_close(a[answered] @ sent, g.sum(0), rtol=0, atol=1e-11)
        assert bool((a[~answered] == 0).all())
    for late in combinations(range(n), s + 1):
        answered = torch.ones(n, dtype=torch.bool)
        answered[list(late)] = False
        found = np.linalg.lstsq(code.matrix[answered].T.numpy(), np.ones(n), rcond=None)[0]
        assert np.abs(found @ code.matrix[answered].numpy() - 1).max() > 1e-3
        assert not code.suffices(answered)
        with pytest.raises(ValueError, match=f"{n - s - 1} of {n} workers"):
            code.decode(answered)


def test_the_example_of_three_workers_decodes_from_any_two() -> None:
    b = torch.tensor([[0.5, 1, 0], [0, 1, -1], [0.5, 0, 1]])
    for answered, a in (([0, 1], [2.0, -1.0]), ([0, 2], [1.0, 1.0]), ([1, 2], [1.0, 2.0])):
        assert (torch.tensor(a) @ b[answered]).tolist() == [1.0, 1.0, 1.0]
    code = Code("cyclic", 3, 1)  # ours has the same form: one row decides the others' ratios
    for i, j in combinations(range(3), 2):
        answered = torch.zeros(3, dtype=torch.bool)
        answered[[i, j]] = True
        assert torch.allclose(code.decode(answered) @ code.matrix, torch.ones(3).double(), atol=1e-14)


def test_without_stragglers_there_is_no_code() -> None:
    code = Code("cyclic", 5, 0)
    everybody = torch.ones(5, dtype=torch.bool)
    assert torch.equal(code.matrix, torch.eye(5).double()) and code.decode(everybody).tolist() == [1.0] * 5
    assert torch.equal(Code("repetition", 5, 0).matrix, code.matrix)


def test_fractional_repetition_decodes_as_long_as_every_block_has_a_survivor() -> None:
    code, g = Code("repetition", 6, 2), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).double()
    sent = code.matrix @ g
    assert sent.tolist() == [7.0] * 3 + [56.0] * 3
    decodable = 0
    for bits in range(64):
        answered = torch.tensor([bool(bits >> i & 1) for i in range(6)])
        if code.suffices(answered):
            decodable += 1
            assert float(code.decode(answered) @ torch.where(answered, sent, 0)) == 63.0
    assert decodable == 7 * 7


@pytest.mark.parametrize(("n", "s"), [(64, 5), (256, 15)])
def test_large_codes_decode_in_float64(n: int, s: int) -> None:
    code, rng = Code("cyclic", n, s), np.random.default_rng(0)
    for late in (rng.permutation(n)[:s], np.arange(s) + 3):
        answered = torch.ones(n, dtype=torch.bool)
        answered[torch.from_numpy(late)] = False
        assert float((code.decode(answered) @ code.matrix - 1).abs().max()) < 1e-7


def test_loads_are_those_of_the_authors_table() -> None:
    table = [
        (_make("uncoded", 256), 0.00390625),
        (_make("gradient_coding", 256, s=15), 0.0625),
        (_make("sr_sgc", 256, B=2, W=3, lam=23), 0.05078),
        (_make("m_sgc", 256, B=1, W=2, lam=27), 0.0075431),
        (_make("gradient_coding", 256, s=9), 0.03906),
        (_make("sr_sgc", 256, B=4, W=9, lam=22), 0.03516),
        (_make("m_sgc", 256, B=1, W=2, lam=24), 0.00751),
        (_make("m_sgc", 6, B=2, W=3, lam=6), 4 / (6 * 2)),
    ]
    for strategy, load in table:
        assert strategy.load == pytest.approx(load, abs=5e-6)


# Gradients -------------------------------------------------------------------------------------------------------


def test_with_ones_for_coefficients_it_is_the_gradient_of_all_samples() -> None:
    task = digits_task(MODELS["logistic"], [9, 7, 5, 1, 0])
    x = torch.randn(task.layout.size, generator=torch.Generator().manual_seed(0))
    got = coded_gradient(cohort(task, [1, 3]), x, torch.ones(2, 5).double(), 0)
    whole = digits_task(MODELS["logistic"], [22])
    expected = coded_gradient(cohort(whole, [0]), x, torch.ones(1, 1).double(), 0)
    torch.testing.assert_close(got, expected.expand(2, -1), rtol=1e-5, atol=1e-6)


def test_parts_of_the_data_add_up_to_all_of_it() -> None:
    task = digits_task(MODELS["logistic"], [19, 7, 5, 1, 0])
    x = torch.randn(task.layout.size, generator=torch.Generator().manual_seed(0))
    coefficients = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double()
    workers = cohort(task, [0, 1, 4])
    whole = coded_gradient(workers, x, coefficients, 0)
    parts = [coded_gradient(workers, x, coefficients, 0, part) for part in ((0, 3, 8), (3, 4, 8), (4, 8, 8))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    assert all(float(part.abs().max()) > 0 for part in parts)


# The twins -------------------------------------------------------------------------------------------------------


def _path(name: str, delays: Tensor, jobs: int, **fields: Any) -> Iterator[tuple[Play, dict[str, Any]]]:
    """Round after round, to the last job's end."""
    strategy = _of(name, num_jobs=jobs, **fields)
    play = Play.start(_task(), strategy, devices=Table(delays, slope=0.05))
    for _ in range(jobs + strategy.delay):
        own = play.step()
        yield play, own


@every_scheme
def test_clock_jobs_and_models_equal_the_twins(name: str) -> None:
    jobs, lr = 40, 0.3
    delays, task, twin = _delays(jobs + 6), _task(), SCHEMES[name][1]
    share = torch.tensor(SAMPLES, dtype=torch.float64) / sum(SAMPLES)
    master = twins.Master(delays.tolist(), slope=0.05)
    models = task.x0.repeat(_of(name).delay + 1, 1)
    now, done, waits, lost = 0.0, 0, 0, 0
    for (play, own), expected in zip(_path(name, delays, jobs), twin.rounds(master, jobs), strict=True):
        now += expected.seconds
        assert play.fleet.now == pytest.approx(now, abs=1e-9)
        assert own.get("stragglers", 0) == len(expected.late)
        for job in expected.decoded:
            x = models[job % len(models)]
            models[job % len(models)] = x - lr * (share[:, None] * task.a * (x - task.b)).sum(0)
        done += len(expected.decoded)
        waits, lost = waits + own.get("waited", 0), lost + len(expected.late)
        assert own["jobs_done"] == done
        torch.testing.assert_close(play.state.models, models, rtol=0, atol=1e-12)
    assert done == jobs
    assert name == "uncoded" or (waits and lost), "the delays try both ways"


@every_scheme
def test_every_scheme_takes_the_steps_of_gradient_descent_on_the_pooled_data(name: str) -> None:
    """The curve over jobs is one and the same: here of a model in float32, with four models that take turns."""
    task = digits_task(MODELS["logistic"], [40, 30, 20, 10, 5, 1, 0, 14])
    strategy = _of(name, lr=0.5, num_models=5, num_jobs=10)
    play = Play.start(task, strategy, devices=Table(_delays(20)))
    for _ in range(10 + strategy.delay):
        play.step()
    whole, x = digits_task(MODELS["logistic"], [120]), task.init(0)
    for _ in range(2):
        x = x - 0.5 * coded_gradient(cohort(whole, [0]), x, torch.ones(1, 1).double(), 0)[0]
    torch.testing.assert_close(play.state.models, x.expand(5, -1), rtol=0, atol=1e-5)
    assert play.state.done == 10


@every_scheme
def test_a_job_draws_the_same_noise_whoever_computes_it(name: str) -> None:
    """Noise is keyed by job and owner of the data, so that all schemes follow one path even where it is drawn."""
    paths = []
    for scheme in ("uncoded", name):
        task = _task()
        task.noise = 0.3
        strategy = _of(scheme, num_models=6, num_jobs=12)
        play = Play.start(task, strategy, devices=Table(_delays(24)))
        play.path(12 + strategy.delay)
        paths.append(play.state.models)
    torch.testing.assert_close(paths[1], paths[0], rtol=0, atol=1e-12)


def test_a_code_of_no_stragglers_and_a_burst_of_none_are_uncoded() -> None:
    delays = _delays(30)
    times = {}
    for name, fields in (
        ("uncoded", {}),
        ("gradient_coding", {"s": 0}),
        ("sr_sgc", {"B": 2, "W": 3, "lam": 0}),
        ("m_sgc", {"B": 1, "W": 2, "lam": 0}),
    ):
        strategy = _make(name, num_jobs=20, num_models=3, **fields)
        assert strategy.load == 1 / NUM
        play = Play.start(_task(), strategy, devices=Table(delays))
        jobs_done = [play.step()["jobs_done"] for _ in range(20 + strategy.delay)]
        at_once = strategy.delay if name == "m_sgc" else 0
        assert jobs_done == [0] * at_once + [*range(1, 21)] + [20] * (strategy.delay - at_once)
        times[name] = play.fleet.now
    assert times["gradient_coding"] == times["sr_sgc"] == times["uncoded"] == float(delays[:, :20].amax(0).sum())
    assert times["m_sgc"] == pytest.approx(float(delays[:, :21].amax(0).sum()))


@every_scheme
def test_without_stragglers_a_job_is_done_in_its_round_or_when_all_its_mini_tasks_are(name: str) -> None:
    strategy = _of(name)
    play = Play.start(_task(), strategy, devices=Table(torch.ones(NUM, 10).double()))
    late = strategy.delay if name.startswith("m_sgc") else 0
    assert [play.step()["jobs_done"] for _ in range(10)] == [0] * late + [*range(1, 11 - late)]
    assert play.fleet.now == 10.0


# Bursts ----------------------------------------------------------------------------------------------------------


def _conforming(n: int, B: int, W: int, lam: int, rounds: int, rng: np.random.Generator) -> list[set[int]]:
    """A random (B, W, lam)-bursty pattern, by the definition."""
    out: list[set[int]] = []
    for _ in range(rounds):
        late: set[int] = set()
        for i in rng.permutation(n)[: rng.integers(0, lam + 2)].tolist():
            if twins.bursty([*out[-W:], late | {i}], B, W, lam):
                late |= {i}
        out.append(late)
    return out


def decoded_in_time(name: str, n: int, B: int, W: int, lam: int, jobs: int, seed: int) -> int:
    """How many jobs of one random conforming pattern are decoded in time; no straggler is ever waited for."""
    strategy = _make(name, n, B=B, W=W, lam=lam, num_jobs=jobs)
    pattern = _conforming(n, B, W, lam, jobs, np.random.default_rng(seed))
    table = torch.tensor([[10.0 if i in late else 1.0 for late in pattern] for i in range(n)]).double()
    play = Play.start(drawn(n, 1), strategy, devices=Table(torch.cat([table, torch.ones(n, strategy.delay)], 1)))
    done = waited = 0
    for t in range(jobs + strategy.delay):
        before = play.fleet.now
        own = play.step()
        waited += own["waited"]
        assert own["jobs_done"] >= min(t + 1 - strategy.delay, jobs) and play.fleet.now - before <= 2.0
        done = own["jobs_done"]
    assert not waited
    return done


@pytest.mark.parametrize("burst", [(1, 2, 4), (2, 3, 4), (2, 5, 3), (1, 3, 4)])
@pytest.mark.parametrize("name", ["sr_sgc", "m_sgc"])
def test_every_job_of_random_conforming_patterns_is_decoded_in_time(name: str, burst: tuple[int, int, int]) -> None:
    assert sum(decoded_in_time(name, 8, *burst, 30, seed) for seed in range(2)) == 60


def test_the_burst_count_of_a_round_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    for B, W, lam in ((1, 2, 3), (2, 3, 3), (2, 5, 2), (3, 4, 5), (1, 4, 2)):
        bursts, past, rounds = Bursts(B, W, lam, 5), (), list[set[int]]()
        verdicts = set()
        for _ in range(60):
            late = set(np.flatnonzero(rng.random(5) < 0.3).tolist())
            mask = torch.tensor([i in late for i in range(5)])
            fits = twins.bursty([*rounds, late], B, W, lam)
            verdicts.add(fits)
            assert bursts.conforms(past, mask) == fits
            rounds.append(late if fits else set())
            past = bursts.remember(past, mask if fits else torch.zeros(5, dtype=torch.bool))
            assert len(past) <= W - 1
        assert verdicts == {True, False}


# Manners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradient_coding", "sr_sgc", "m_sgc"])
def test_a_worker_uploads_its_part_and_a_straggler_nothing(name: str) -> None:
    delays = torch.ones(NUM, 8).double()
    delays[3, 0] = 5.0
    play = Play.start(_task(), _of(name), devices=Table(delays))
    assert play.step()["stragglers"] == 1 and play.fleet.now == 2.0
    vector, table = 32 * 3, 32 * (NUM + 1) if name == "m_sgc" else 0
    assert play.fleet.ledger.bits_up == (NUM - 1) * vector
    assert play.fleet.ledger.bits_down == NUM * (vector + table)
    play.step()
    jobs = 2 if name == "m_sgc" else 1  # of a round: their models down, and a result of each up
    assert play.fleet.ledger.bits_up == (NUM - 1 + NUM * jobs) * vector


@pytest.mark.parametrize("name", ["uncoded", "gradient_coding", "sr_sgc", "m_sgc"])
def test_a_worker_that_never_answers_blocks_nothing(name: str) -> None:
    """Uncoded jobs and those of M-SGC need every worker's own chunks: they are lost, and models stay as they are."""
    silent = Byzantine(ids=torch.tensor([1]), attack=lambda *_: None, seed=0)
    play = Play.start(_task(), _of(name), devices=Table(torch.ones(NUM, 12).double()), byzantine=silent)
    rows = [play.step() for _ in range(12)]
    assert play.fleet.now >= 12.0
    assert rows[-1]["jobs_done"] == {"uncoded": 0, "gradient_coding": 12, "sr_sgc": 12, "m_sgc": 0}[name]
    assert torch.equal(play.state.models[0], _task().x0) == (name in ("uncoded", "m_sgc"))


def test_to_a_code_a_worker_that_drops_out_is_one_more_straggler() -> None:
    """Where two of eight may be missing, a job is lost if three die, and takes its step if fewer do."""
    dropout = Dropout(probability=0.2)
    play = Play.start(
        _task(), _of("gradient_coding"), devices=Table(torch.ones(NUM, 40).double()), absence=Absence(dropout=dropout)
    )
    verdicts = set()
    for _ in range(40):
        before, own = play.state.done, play.step()
        dead = NUM - play.seen["num_clients"]
        verdicts.add(dead > 2)
        assert own["jobs_done"] - before == (dead <= 2)
        assert own["stragglers"] in (0, dead)
    assert verdicts == {True, False} and not play.fleet.sent and not len(play.fleet.queue)


def test_a_round_of_a_code_waits_until_enough_workers_are_there() -> None:
    config = {
        "rounds": 12,
        "task": {"name": "quadratic", "dim": 2},
        "clients": {
            "count": NUM,
            "devices": {"name": "constant", "seconds_per_step": 0.1},
            "availability": {"name": "bernoulli", "p": 0.8, "seconds": 5.0},
        },
        "strategy": {"name": "gradient_coding", "lr": 0.3, "s": 2},
    }
    rows = rows_of(config)
    assert rows[-1]["jobs_done"] > 6 and rows[-1]["virtual_seconds"] > 12 * 0.3
    for name, fields in (("uncoded", {}), ("m_sgc", {"B": 1, "W": 2, "lam": 2})):
        with pytest.raises(ConfigError, match="clients.availability: .*every worker"):
            rows_of({**config, "strategy": {"name": name, "lr": 0.3, **fields}})


BAD = {
    "s=8 cannot be decoded with 8 workers": ("gradient_coding", {"s": 8}),
    r"s must lie in \[0, 7\]; lower it": ("gradient_coding", {"s": -1}),
    "s [+] 1 = 3 chunks, which does not divide the 8 workers; take s=1": (
        "gradient_coding",
        {"s": 2, "code": "repetition"},
    ),
    "B=2 must divide W - 1 = 3, .* take W=3 or W=5": ("sr_sgc", {"B": 2, "W": 4, "lam": 3}),
    "B=3 and W=3: .* take 1 <= B < W": ("m_sgc", {"B": 3, "W": 3, "lam": 3}),
    "B=0 and W=3: ": ("sr_sgc", {"B": 0, "W": 3, "lam": 3}),
    r"lam=9 distinct stragglers cannot be among 8 workers; lam must lie in \[0, 8\]": (
        "m_sgc",
        {"B": 1, "W": 2, "lam": 9},
    ),
    "num_models=2 models take turns, .* 2 rounds .* at least 3": (
        "sr_sgc",
        {"B": 2, "W": 3, "lam": 2, "num_models": 2},
    ),
    "mu must be 0 or more": ("gradient_coding", {"s": 1, "mu": -0.5}),
    "num_jobs must be at least 1": ("uncoded", {"num_jobs": 0}),
    "lr must be positive": ("uncoded", {"lr": 0.0}),
    "code=repetition deals blocks of s [+] 1 = 4 .from lam=3.|does not divide": (
        "m_sgc",
        {"B": 1, "W": 2, "lam": 2, "code": "repetition"},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_parameters_that_cannot_decode_are_refused_with_numbers_and_way_out(message: str) -> None:
    name, fields = BAD[message]
    config = {
        "task": {"name": "quadratic", "dim": 2},
        "clients": {"count": NUM},
        "strategy": {"name": name, "lr": 0.1, **fields},
    }
    with pytest.raises(ConfigError, match=rf"config: strategy: .*{message}"):
        rows_of(config)


def test_links_and_rules_that_would_spoil_the_decoding_are_refused() -> None:
    config = {"task": {"name": "quadratic", "dim": 2}, "clients": {"count": 4}}
    strategy = {"name": "gradient_coding", "lr": 0.1, "s": 1}
    with pytest.raises(ConfigError, match="uplink.compressor: .*decoder's coefficients"):
        rows_of({**config, "strategy": strategy, "uplink": {"compressor": {"name": "top_k", "k": 1}}})
    with pytest.raises(ConfigError, match="strategy.aggregator: .*no other rule could"):
        rows_of({**config, "strategy": {**strategy, "aggregator": "median"}})
