"""Clients' own models on samples that they hold out: numbers by hand, and that nothing of it enters the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from fedsim import runs
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.evaluation import Evaluate, own_metrics
from fedsim.report import write_report
from tests.build import Rows, rows_of, train
from tests.reference.clients import Modules


def config(strategy: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "rounds": 4,
        "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [16]}},
        "partition": {"name": "dirichlet", "alpha": 0.3},
        "clients": {"count": 6},
        "data": {"client_test": 0.25},
        "strategy": strategy or {"name": "fedper", "cohort_size": 4},
        "local": {"epochs": 1, "batch_size": 10, "optimizer": {"name": "sgd", "lr": 0.1}},
        "evaluate": {"every": 2},
        "runtime": {"workers": 1, "stack": 2},
    } | changes


def without_own(rows: Rows) -> Rows:
    return [{k: v for k, v in row.items() if not k.startswith(("personal_", "global_"))} for row in rows]


def test_own_models_are_scored_one_by_one_on_what_their_clients_hold_out() -> None:
    composition = compose(config(), "config")
    e = composition.experiment
    state, rows, _ = train(e)
    assert composition.samples is not None
    module, layout, held = composition.samples.module, e.task.layout, e.task.held  # type: ignore[attr-defined]
    body, kept = layout.views(state.x), e.fleet.memory.of(torch.arange(6))  # type: ignore[attr-defined]
    loss, hits, each = 0.0, 0.0, []
    for i, (a, b) in enumerate(zip(held.offsets[:-1].tolist(), held.offsets[1:].tolist(), strict=True)):
        head = kept["personal"][i] if kept["personal/known"][i] else e.task.init(0)[-170:]
        own = {**body, "3.weight": head[:160].view(10, 16), "3.bias": head[160:]}
        logits = functional_call(module, own, held.inputs[a:b])
        loss += float(F.cross_entropy(logits, held.targets[a:b], reduction="sum"))
        right = (logits.argmax(1) == held.targets[a:b]).double()
        hits += float(right.sum())
        each.append(right.mean())
    total, last = len(held.targets), rows[-1]
    assert total + int(e.task.num_examples.sum()) == 1438 and abs(total - 1438 / 4) <= 3
    assert last["personal_loss"] == pytest.approx(loss / total, rel=1e-5)
    assert last["personal_accuracy"] == pytest.approx(hits / total)
    assert last["personal_accuracy_std"] == pytest.approx(float(torch.stack(each).std(correction=0)))
    assert last["personal_accuracy_worst_decile"] == pytest.approx(float(min(each)))
    assert "personal_loss" not in rows[0] and last["global_accuracy"] < last["personal_accuracy"]


def test_tuning_is_plain_training_of_the_received_model_with_batches_of_its_own() -> None:
    composition = compose(config({"name": "fedavg"}), "config")
    task, fleet, strategy = composition.experiment.task, composition.experiment.fleet, composition.experiment.strategy
    data, ends, x = task.data, task.data.offsets.tolist(), task.init(0)  # type: ignore[attr-defined]
    got = fleet.evaluate(fleet.clients, strategy.own_scores, x=x, epochs=2)
    composition.close()
    rows = [data.order[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    inputs, targets = [data.inputs[r] for r in rows], [data.targets[r] for r in rows]
    twin = Modules(task.module, inputs, targets, 10, epochs=2, seed=~0)  # type: ignore[attr-defined]
    for i in range(6):
        y = x
        for k in range(twin.steps(i)):
            y = y - 0.1 * twin.gradient(i, y, 0, k)
        expected = task.evaluate_own(torch.tensor([i]), y[None])
        assert float(got["personal_loss"][i]) == pytest.approx(float(expected["loss"]), rel=1e-4)
        assert float(got["global_loss"][i]) != pytest.approx(float(expected["loss"]), rel=1e-2)


@pytest.mark.parametrize(
    "strategy, optimizer",
    [
        ({"name": "fedper", "cohort_size": 4}, {"name": "sgd", "lr": 0.1}),
        ({"name": "fedavg"}, {"name": "adam", "lr": 0.01, "state_scope": "client"}),
        ({"name": "fedavg"}, {"name": "adam", "lr": 0.01, "state_scope": "server"}),
        ({"name": "scaffold"}, {"name": "sgd", "lr": 0.1}),
        ({"name": "fedbuff", "buffer_size": 2}, {"name": "sgd", "lr": 0.1}),
    ],
)
def test_nothing_of_an_evaluation_enters_the_run(strategy: dict[str, Any], optimizer: dict[str, Any]) -> None:
    local = {"epochs": 1, "batch_size": 10, "optimizer": optimizer}
    never = rows_of(config(strategy, local=local, evaluate={"every": 4}))
    often = rows_of(config(strategy, local=local, evaluate={"every": 1, "personalise": {"epochs": 2}}))
    assert without_own(never)[-1] == without_own(often)[-1]
    assert often[-1]["personal_loss"] < often[-1]["global_loss"]
    assert often[-1]["global_loss"] == never[-1]["global_loss"]


def test_own_models_survive_a_resume_and_lie_in_the_runs_folder(tmp_path: Path) -> None:
    tuned = {"every": 1, "personalise": {"epochs": 1}}
    whole = runs.run(config(evaluate=tuned), out=tmp_path / "whole")
    runs.run(config(evaluate=tuned, rounds=2), out=tmp_path / "run")
    again = runs.run(config(evaluate=tuned), out=tmp_path / "run", resume=True)
    assert [r["personal_loss"] for r in again.rows] == [r["personal_loss"] for r in whole.rows]
    clients = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    held = [c["held_out"] for c in clients]
    mean = sum(n * c["personal_accuracy"] for n, c in zip(held, clients, strict=True)) / sum(held)
    assert mean == pytest.approx(whole.rows[-1]["personal_accuracy"])
    page = write_report(tmp_path / "run").read_text()
    assert "own models by round" in page and "With their own models, on what they hold out" in page


def test_metrics_weigh_clients_by_what_they_hold_out_and_leave_out_who_holds_nothing() -> None:
    scores = {"examples": torch.tensor([1.0, 3.0, 0.0]), "personal_accuracy": torch.tensor([1.0, 0.5, torch.nan])}
    assert own_metrics(scores, per_client=False) == {"personal_accuracy": 0.625}
    spread = {"personal_accuracy_std": 0.25, "personal_accuracy_worst_decile": 0.5}
    assert own_metrics(scores, per_client=True) == {"personal_accuracy": 0.625, **spread}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {"client_test": 1.0}}, r"data: client_test must be in \[0, 1\), got 1.0"),
        ({"evaluate": {"personalise": {"epochs": -1}}}, "evaluate.personalise: epochs must be 0 or more, got -1"),
        ({"data": {}, "evaluate": {"personalise": {"epochs": 1}}}, "evaluate.personalise: .* set data.client_test"),
        (
            {"strategy": {"name": "dsgd"}, "evaluate": {"personalise": {"epochs": 1}}},
            "evaluate.personalise: this strategy has no server",
        ),
        (
            {"task": {"name": "quadratic"}, "partition": None, "strategy": {"name": "fedavg"}},
            "data.client_test: quadratic has no samples",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(config(**changes), "config")


def test_a_share_of_which_nobody_has_a_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.client_test: no client has so many samples"):
        rows_of(config(data={"client_test": 1e-4}))


def test_a_strategy_whose_clients_have_no_model_of_their_own_is_scored_with_the_servers() -> None:
    last = rows_of(config({"name": "fedavg"}, rounds=2))[-1]
    assert last["personal_loss"] == last["global_loss"] and Evaluate().personalise.epochs == 0


def test_models_of_their_own_that_nobody_would_see_are_warned_of() -> None:
    for strategy in ({"name": "fedrep"}, {"name": "ditto"}):
        with pytest.warns(UserWarning, match="clients have models of their own, .* set data.client_test: 0.2"):
            compose(config(strategy, data={}), "config").close()
        compose(config(strategy), "config").close()
    compose(config({"name": "fedavg"}, data={}), "config").close()
