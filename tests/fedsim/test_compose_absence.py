"""Absence in an experiment file: what its plan says, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.overrides import read_file
from fedsim.sim.availability import Markov

SMALL: dict[str, Any] = {
    "rounds": 40,
    "task": {"name": "quadratic", "dim": 3},
    "clients": {"count": 20, "devices": {"name": "constant", "seconds_per_step": 0.5}},
    "strategy": {"name": "fedavg", "cohort_size": 8},
    "local": {"steps": 2, "optimizer": {"name": "sgd", "lr": 0.05}},
}


def _with(clients: dict[str, Any] | None = None, **strategy: Any) -> dict[str, Any]:
    return SMALL | {
        "clients": SMALL["clients"] | (clients or {}),
        "strategy": SMALL["strategy"] | strategy,
    }


def _plan(raw: dict[str, Any]) -> dict[str, str]:
    composition = compose(raw, "x.yaml")
    composition.close()
    return composition.plan


def test_the_plan_says_how_many_will_be_there_and_in_how_many_rounds_a_cohort_is() -> None:
    """All are on line in the first quarter of a day of 40 seconds, which is as long as 40 rounds of a second."""
    day = {"name": "diurnal", "period": 40.0, "share": 0.25, "spread": 0.0}
    words = _plan(_with({"availability": day, "dropout": {"probability": 0.1}}))["absence"]
    assert words == (
        "5.0 of 20 clients on line on average (0 to 20) over about 40 s; 8 at once in 25% of rounds; 10% of jobs die"
    )
    assert _plan(_with({"dropout": {"probability": 0.1}}))["absence"] == "10% of jobs die"
    assert "absence" not in _plan(SMALL)


def test_what_makes_no_sense_is_refused_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("client,active,inactive\n0,0,1\n")
    trace = {"name": "trace", "path": str(tmp_path / "trace.csv")}
    for raw, words in (
        (_with({"availability": trace}), r"clients.availability: path .*: no interval for 19 of 20 clients"),
        (_with({"availability": {"name": "bernoulli", "p": 2.0}}), r"clients.availability: p must be a probability"),
        (_with({"availability": {"name": "bernoulli"}}), r"clients.availability.p: missing"),
        (_with({"dropout": {"probability": 1.0}}), r"clients.dropout: probability must lie in \[0, 1\)"),
        (_with(deadline=0.9), r"strategy: deadline=0.9 seconds is less than any client .* the fastest 1; raise"),
        (_with(late="keep"), r"strategy: late: keep needs a deadline or over_select"),
        (_with(late="lose"), r"strategy.late: "),
    ):
        with pytest.raises(ConfigError, match=r"x.yaml: " + words):
            compose(raw, "x.yaml")


ONE_PASS = {"centralised": 0.5, "mime": 0.5}
TWICE = dict.fromkeys(["apfl", "ditto", "fedavg_m_vr", "mb_storm", "scaffold_m_vr"], 2.0)


@pytest.mark.parametrize(("name", "seconds"), (ONE_PASS | TWICE).items())
def test_a_deadline_is_judged_by_the_job_that_a_round_waits_for(name: str, seconds: float) -> None:
    """Where local training is two passes of half a second: a step, or a pass over all data; two gradients a step."""
    raw = SMALL | {"local": {"epochs": 2, "batch_size": "full", "optimizer": {"name": "sgd", "lr": 0.05}}}
    compose(raw | {"strategy": {"name": name, "deadline": seconds + 0.1}}, "x.yaml").close()
    with pytest.raises(ConfigError, match=rf"strategy: deadline=.* less than any client .* fastest {seconds:g};"):
        compose(raw | {"strategy": {"name": name, "deadline": seconds - 0.1}}, "x.yaml")


@pytest.mark.parametrize(
    "clients",
    [{"availability": {"name": "markov", "on_seconds": 1, "off_seconds": 1}}, {"dropout": {"probability": 0.1}}],
)
@pytest.mark.parametrize("name", ["monna", "masha1", "extragradient"])
def test_strategies_that_need_every_client_refuse_absence(name: str, clients: dict[str, Any]) -> None:
    raw = _with(clients) | {"strategy": {"name": name, **({} if name == "monna" else {"lr": 0.01})}}
    if name in ("masha1", "extragradient"):
        del raw["local"]
    with pytest.raises(ConfigError, match=rf"clients.{next(iter(clients))}: does not go with this strategy: every "):
        compose(raw, "x.yaml")


def test_a_deadline_is_judged_by_the_question_before_the_work_as_well() -> None:
    """A third of a pass of 3 steps of half a second, where the work itself is one step."""
    raw = SMALL | {"task": {"name": "classification", "model": "logistic"}, "partition": {"name": "iid"}}
    raw["local"] = {"steps": 1, "batch_size": 10, "optimizer": {"name": "sgd", "lr": 0.05}}
    asking = {"name": "fedavg", "cohort_size": 2, "selection": {"name": "power_of_choice", "candidates": 4}}
    with pytest.raises(ConfigError, match=r"strategy: deadline=1 seconds is less than any client .* the fastest 1.3"):
        compose(raw | {"strategy": asking | {"deadline": 1.0}}, "x.yaml")
    remembered = asking | {"selection": asking["selection"] | {"losses": "remembered"}, "deadline": 1.0}
    compose(raw | {"strategy": remembered}, "x.yaml").close()


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("stem", {"selection": "oort"}, "strategy.selection: does not go with this strategy: every client takes part"),
        ("stem", {"over_select": 1.5}, "strategy.over_select: does not go with this strategy: every client takes part"),
        (
            "centralised",
            {"selection": "cyclic"},
            "strategy.selection: does not go with this strategy: one machine has all",
        ),
        ("fedbuff", {"buffer_size": 21}, "strategy: buffer_size=21 exceeds the 20 clients with data; lower it"),
        ("fedbuff_stream", {"concurrency": 21}, "strategy: concurrency=21 exceeds the 20 clients with data; lower it"),
        (
            "fedfix",
            {"interval": 1.0, "job_seconds": [1.0]},
            "strategy: job_seconds needs one positive number for each of",
        ),
    ],
)
def test_what_the_first_round_would_refuse_is_refused_before_it(name: str, fields: dict[str, Any], words: str) -> None:
    raw = SMALL | {"strategy": {"name": name, **fields}}
    with pytest.raises(ConfigError, match=r"x.yaml: " + words):
        compose(raw, "x.yaml")


def test_unbiased_weights_are_refused_before_the_run_where_jobs_take_no_time() -> None:
    raw = SMALL | {"clients": {"count": 4, "devices": {"name": "constant", "seconds_per_step": 0.0}}}
    with pytest.raises(ConfigError, match=r"x.yaml: strategy: weights=unbiased follow from how long jobs take"):
        compose(raw | {"strategy": {"name": "async_fedavg", "weights": "unbiased"}}, "x.yaml")
    compose(raw | {"strategy": {"name": "async_fedavg", "weights": "identical"}}, "x.yaml").close()


def test_more_clients_than_ever_come_at_once_are_refused_before_the_run(tmp_path: Path) -> None:
    """Of four workers two come first and two later; a code needs two at once if it bears two, and else three."""
    (tmp_path / "trace.csv").write_text("client,active,inactive\n0,0,5\n1,0,5\n2,6,9\n3,6,9\n")
    trace = {"name": "trace", "path": str(tmp_path / "trace.csv")}
    raw = SMALL | {"clients": {"count": 4, "availability": trace}}
    del raw["local"]
    code = {"name": "gradient_coding", "lr": 0.1}
    compose(raw | {"strategy": code | {"s": 2}}, "x.yaml").close()
    with pytest.raises(ConfigError, match=r"clients.availability: 3 of 4 clients are needed at once from second 0 on"):
        compose(raw | {"strategy": code | {"s": 1}}, "x.yaml")


def test_the_keys_of_an_availability_are_written_in_a_file_as_they_are(tmp_path: Path) -> None:
    text = "clients: {count: 4, availability: {name: markov, on_seconds: 5, off_seconds: 2}}"
    (tmp_path / "x.yaml").write_text(text)
    composition = compose(read_file(tmp_path / "x.yaml"), "x.yaml")
    composition.close()
    assert composition.experiment.fleet.absence.availability == Markov(on_seconds=5.0, off_seconds=2.0)
