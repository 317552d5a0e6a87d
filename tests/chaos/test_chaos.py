"""Whatever is killed, whenever: the rows and the model of a run in which nothing was.

make chaos
CHAOS_SEED=7 pytest -m chaos tests/chaos -k "ray-3" -s    one case of another seed again
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.build import rows_in
from tests.chaos.killing import RAY, ROUNDS, SEED, Kill, Play, config, drawn_strategy, generator, undisturbed
from tests.fedsim.test_runs import model

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

IN_PROCESS, ON_RAY, KILLS_ON_RAY = 60, 8, 4  # runs; kills of each run on Ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.mark.parametrize("case", range(IN_PROCESS), ids=lambda case: f"process-{case}")
def test_a_run_that_is_killed_goes_on_to_the_same_bits(case: int, folder: Path) -> None:
    """Every other one at any time, most of which goes into its start and its end; the rest in a round."""
    strategy, rng = drawn_strategy(case), generator(2, case)
    whole, seconds = undisturbed(strategy, case, folder)
    at, delay, killed = float(rng.random()), float(rng.random() * 0.02), False
    while not killed:  # a run that was quicker than the kill is killed sooner the next time
        play = Play(config(strategy, case, ray=False), folder / f"{case}-{at:.3f}")
        if case % 2:
            play.until(int(at * ROUNDS))
            time.sleep(delay)
        else:
            time.sleep(at * seconds)
        rounds, killed = play.rounds(), play.kill("driver", rng)
        play.finish()
        at /= 2
    same = check(strategy, play.folder, whole)
    print(f"seed {SEED}, process-{case}: {strategy}, driver killed when {rounds} rounds were written: {same}")


def kills_on_ray(case: int) -> list[Kill]:
    """Workers most of all, then all others by turns, at any time of the run; each run loses one other."""
    rng = generator(4, case)
    others = ["driver", *(name for name in RAY if name != "worker")]
    victims = rng.permutation(["worker"] * (KILLS_ON_RAY - 1) + [others[case % len(others)]])
    times = sorted(rng.choice(ROUNDS - 1, KILLS_ON_RAY, replace=False).tolist())
    return [Kill(str(v), at, float(rng.random() * 0.1)) for v, at in zip(victims, times, strict=True)]


@pytest.mark.ray
@pytest.mark.parametrize("case", range(ON_RAY), ids=lambda case: f"ray-{case}")
def test_a_run_on_ray_that_loses_whatever_it_uses_gives_the_same_bits(case: int, folder: Path) -> None:
    strategy, rng = drawn_strategy(case + IN_PROCESS), generator(5, case)
    whole, _ = undisturbed(strategy, case + IN_PROCESS, folder)
    play = Play(config(strategy, case + IN_PROCESS, ray=True), folder / f"{case}-ray")
    told = []
    try:
        for kill in kills_on_ray(case):
            play.until(kill.at)
            time.sleep(kill.delay)
            before = play.rounds()
            while play.running and not play.kill(kill.victim, rng):
                time.sleep(0.05)  # it is being started
            told.append(f"{kill.victim} when {before} rounds were written")
        play.finish()
    finally:
        play.stop()
    same = check(strategy, play.folder, whole)
    print(f"seed {SEED}, ray-{case}: {strategy}, killed: {'; '.join(told)}: {same}")


def check(strategy: str, folder: Path, whole: Path) -> str:
    """That two folders hold the same, and nothing half-written."""
    assert rows_in(folder) == rows_in(whole), strategy
    assert len(rows_in(folder)) == ROUNDS, strategy
    assert model(folder) == model(whole), strategy
    assert not [*folder.rglob("*.part*"), *folder.rglob("*.tmp*")], strategy
    return "the same bits"
