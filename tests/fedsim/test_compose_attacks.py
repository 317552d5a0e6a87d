"""Attacks that a strategy cannot bear, or that are not defined for so many clients, are refused before the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.compose import compose
from fedsim.config import ConfigError
from tests.build import rows_of

SMALL: dict[str, Any] = {"rounds": 4, "task": {"name": "quadratic", "dim": 3}}
CODES: dict[str, dict[str, Any]] = {
    "uncoded": {},
    "gradient_coding": {"s": 2},
    "sr_sgc": {"B": 1, "W": 2, "lam": 4},  # a code of s = 2
    "m_sgc": {"B": 1, "W": 2, "lam": 3},
}
BORNE = {"uncoded": 0, "gradient_coding": 2, "sr_sgc": 2, "m_sgc": 0}


def _with(attack: Any, count: int, **strategy: Any) -> dict[str, Any]:
    clients = {"count": 8, "byzantine": {"attack": attack, "count": count}}
    return SMALL | {"clients": clients, "strategy": strategy}


@pytest.mark.parametrize("name", CODES)
def test_a_code_bears_as_many_silent_workers_as_it_can_decode_without_and_refuses_more(name: str) -> None:
    coded, borne = {"name": name, "lr": 0.1, **CODES[name]}, BORNE[name]
    if borne:
        there, gone = (rows_of(_with("silence", count, **coded)) for count in (0, borne))
        assert gone[-1]["jobs_done"] == there[-1]["jobs_done"] >= 3
        assert gone[-1]["distance"] == pytest.approx(there[-1]["distance"], rel=1e-4), "it is gradient descent on all"
    words = f"clients.byzantine: {borne + 1} of 8 clients are silent, and without {8 - borne} that answer this strategy"
    with pytest.raises(ConfigError, match=words):
        compose(_with("silence", borne + 1, **coded), "x.yaml")


def test_servers_and_peers_that_go_on_without_the_silent_are_left_alone() -> None:
    for name in ("fedavg", "dsgd", "fedbuff_stream"):
        fields = {"buffer_size": 2, "concurrency": 4} if name == "fedbuff_stream" else {}
        rows = rows_of(_with("silence", 7, name=name, **fields) | {"evaluate": {"every": 1}})
        assert rows[-1]["distance"] != rows[0]["distance"], name  # the one that answers moves the model


@pytest.mark.parametrize(
    "attack, count, words",
    [
        ({"name": "alie", "k": "max"}, 5, "alie.k=max is not defined for n=8 clients with b=5"),
        ({"name": "mimic", "target": 7}, 2, "mimic.target=7 is not one of the 6 honest clients"),
    ],
)
def test_an_attack_that_is_not_defined_for_all_clients_is_refused_before_the_run(
    attack: dict[str, Any], count: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"x.yaml: clients.byzantine.attack: {words}"):
        compose(_with(attack, count, name="fedavg"), "x.yaml")


def test_of_a_cohort_an_attack_is_refused_that_no_draw_of_it_could_bear() -> None:
    copy = {"name": "mimic", "target": 2}
    compose(_with(copy, 2, name="fedavg", cohort_size=4), "x.yaml").close()
    with pytest.raises(ConfigError, match="mimic.target=2 is not one of the 2 honest clients"):
        compose(_with(copy, 2, name="fedavg", cohort_size=3), "x.yaml")


def test_a_code_whose_workers_are_heard_one_by_one_has_nobody_else_to_copy() -> None:
    coded = {"name": "gradient_coding", "lr": 0.1, "s": 2}
    compose(_with({"name": "mimic", "target": 0}, 1, **coded), "x.yaml").close()
    with pytest.raises(ConfigError, match="mimic.target=1 is not one of the 1 honest clients"):
        compose(_with({"name": "mimic", "target": 1}, 1, **coded), "x.yaml")


def test_the_worst_factor_is_sought_against_the_rule_in_use_and_refused_where_there_is_none() -> None:
    trimmed = {"name": "fedavg", "aggregator": {"name": "trimmed_mean", "f": 2}}

    def after_a_step(attack: Any, **strategy: Any) -> Tensor:
        rows = rows_of(_with(attack, 2, **strategy) | {"rounds": 1, "evaluate": {"every": 1}})
        return torch.tensor(rows[-1]["x"])

    honest = after_a_step("silence", name="fedavg", aggregator={"name": "mean", "weights": "uniform"})
    harm = {
        k: float((after_a_step({"name": "alie", "k": k}, **trimmed) - honest).norm()) for k in (0.5, 2, "optimised")
    }
    assert harm["optimised"] >= max(harm.values()) > 0.0
    for name, more in (("fedbuff", {"buffer_size": 4}), ("scaffold", {}), ("fedasync", {})):
        compose(_with({"name": "foe", "tau": "optimised"}, 1, name=name, **more), "x.yaml").close()
    with pytest.raises(ConfigError, match="clients.byzantine.attack: foe.tau=optimised tries factors"):
        compose(_with({"name": "foe", "tau": "optimised"}, 1, name="uncoded", lr=0.1), "x.yaml")


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "dsgd"},
        {"name": "gradient_tracking"},
        {"name": "monna", "f": 2, "beta": 0.5},
        {"name": "clipped_gossip", "f": 2, "beta": 0.5},
        {"name": "bridge", "aggregator": {"name": "trimmed_mean", "f": 2}},
    ],
    ids=lambda strategy: strategy["name"],
)
def test_among_peers_it_is_sought_against_what_they_make_of_what_they_hear(strategy: dict[str, Any]) -> None:
    def after_two_steps(k: Any) -> Tensor:
        rows = rows_of(_with({"name": "alie", "k": k}, 2, **strategy) | {"rounds": 2, "evaluate": {"every": 2}})
        return torch.tensor(rows[-1]["x"])

    moved = {k: float((after_two_steps(k) - after_two_steps(0)).norm()) for k in (0.5, 8, "optimised")}
    assert moved["optimised"] >= max(moved.values()) > 0.0


def test_a_back_door_needs_images_and_a_class_that_there_is() -> None:
    digits = SMALL | {"task": {"name": "classification", "dataset": "digits", "model": "logistic"}}
    for attack, words in (
        (
            {"name": "backdoor", "size": 9},
            "backdoor writes a patch of 9 x 9 pixels into images, and .* is 8 x 8 pixels",
        ),
        ({"name": "model_replacement", "target": 10}, "model_replacement.target=10 is none of the 10 classes"),
    ):
        with pytest.raises(ConfigError, match=f"clients.byzantine.attack: {words}"):
            compose(digits | {"clients": {"count": 8, "byzantine": {"attack": attack, "count": 2}}}, "x.yaml")
    rows = rows_of(digits | {"clients": {"count": 8, "byzantine": {"attack": "backdoor", "count": 2}}, "rounds": 1})
    assert 0 <= rows[-1]["test_attack_success"] <= 1


def test_worker_momentum_is_the_running_mean_of_a_clients_gradients() -> None:
    a, b, x = [1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, -1.0, 2.0, 0.5], 2.0
    rows = rows_of(
        {
            "rounds": 5,
            "task": {"name": "quadratic", "a": a, "b": b, "x0": x},
            "clients": {"count": 5, "byzantine": {"attack": "sign_flip", "ids": [4]}},
            "strategy": {"name": "fedavg", "server_lr": 0.1, "aggregator": {"name": "trimmed_mean", "f": 1}},
            "local": {
                "steps": 1,
                "batch_size": "full",
                "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.9, "ema": True, "state_scope": "client"},
            },
            "evaluate": {"every": 1},
        }
    )
    m = [0.0] * 4
    for row in rows[-5:]:
        m = [0.9 * old + 0.1 * a[i] * (x - b[i]) for i, old in enumerate(m)]
        sent = sorted([*m, -sum(m) / 4])
        x -= 0.1 * sum(sent[1:-1]) / 3
        assert row["x"] == pytest.approx([x], abs=1e-6)
