"""What a strategy declares holds for a user's own class as for those of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import fedsim
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.strategies.server import ServerState, Synchronous
from tests.contracts.outside import Halved

HERE = __name__
CONFIG: dict[str, Any] = {"rounds": 2, "task": "quadratic", "clients": {"count": 4}, "runtime": {"workers": 1}}


class NotOne:
    def init(self, x0: Tensor) -> None: ...

    def round(self, s: Any, fleet: Any, rng: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Picky(Halved):
    """A class of a user's own that bears little."""

    traits: ClassVar[fedsim.Traits] = fedsim.Traits(
        local_rules="plain_sgd", no_links="its messages are secret", refused={"cohort_size": "it asks everybody"}
    )


@dataclass(frozen=True, kw_only=True)
class Signed(Synchronous):
    """Clients send signs; cohort, rule and step are everybody's."""

    def round(self, s: ServerState, fleet: Any, rng: Any) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng)
        s, r = self.ask(s, fleet, rng, self.signs, rule=rule, x=s.x)
        return self.step(s, r.mean("d", rule)), {}

    def signs(self, clients: Any, x: Tensor) -> dict[str, Tensor]:
        return {"d": self.local(clients, x).delta.dense().sign()}


def _refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        compose({**CONFIG, **changes}, "x.yaml").close()
    return str(caught.value)


def test_a_class_that_is_no_strategy_is_told_what_to_write() -> None:
    message = _refusal({"strategy": f"{HERE}:NotOne"})
    assert message.startswith("x.yaml: strategy.name: NotOne is no strategy; write `class NotOne(fedsim.Strategy)`")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, ""),
        ({"uplink": {"compressor": "natural"}}, "uplink.compressor: does not go with this strategy: its messages are"),
        (
            {"strategy": {"name": f"{HERE}:Picky", "cohort_size": 2}},
            "cohort_size: does not go with this strategy: it asks",
        ),
        ({"local": {"optimizer": {"name": "adam", "lr": 0.1}}}, "corrects the direction of every local step"),
        (
            {"local": {"optimizer": {"name": "sgd", "lr": 0.1, "state_scope": "server"}}},
            "local.optimizer.state_scope: server is not for this strategy",
        ),
    ],
)
def test_traits_of_a_users_class_are_obeyed(changes: dict[str, Any], message: str) -> None:
    raw = {"strategy": f"{HERE}:Picky", **changes}
    if message:
        assert message in _refusal(raw)
    else:
        assert len(fedsim.run({**CONFIG, **raw}).rows) == 2


def test_a_users_server_has_cohorts_rules_and_optimizers() -> None:
    strategy = {
        "name": f"{HERE}:Signed",
        "cohort_size": 3,
        "aggregator": {"name": "trimmed_mean", "f": 1},
        "server_optimizer": {"name": "adam", "lr": 0.1},
    }
    composition = compose({**CONFIG, "strategy": strategy}, "x")
    composition.close()
    assert composition.plan["clients"] == "4, 3 of them in a round"
    rows = fedsim.run({**CONFIG, "strategy": strategy}).rows
    assert [r["num_clients"] for r in rows] == [3, 3]
    message = _refusal({"strategy": {**strategy, "cohort_size": 2}})
    assert "strategy.aggregator: does not fit 2 replies at a time: trimmed_mean needs more than 2f = 2 rows" in message


@pytest.mark.parametrize(
    "name, key, reason",
    [
        ("fedfix", "cohort_size", "every client with data is at work"),
        ("dsgd", "aggregator", "peers average among themselves"),
        ("masha2", "pre_aggregators", "does not add up"),
        ("extragradient", "server_optimizer", "look ahead"),
    ],
)
def test_a_key_that_a_strategy_can_not_have_is_refused_with_its_reason(name: str, key: str, reason: str) -> None:
    message = _refusal({"strategy": {"name": name, key: 2}})
    assert message.startswith(f"x.yaml: strategy.{key}: does not go with this strategy: ") and reason in message


def test_median_of_signs_is_what_the_server_steps_along() -> None:
    strategy = {"name": f"{HERE}:Signed", "aggregator": "median", "server_lr": 0.5}
    task = {"name": "quadratic", "a": [1, 1, 1], "b": [0, 0, 9], "x0": 2}
    raw = {"rounds": 1, "task": task, "runtime": {"workers": 1}, "strategy": strategy}
    x = torch.tensor(fedsim.run(raw).rows[-1]["x"])
    torch.testing.assert_close(x, torch.tensor([1.5]))  # two clients of three go down
