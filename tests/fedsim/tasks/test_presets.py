"""Regression, labels, language models and tasks of one's own: runs equal plain loops of autograd, client by client, and
metrics are those of scikit-learn, of numpy or worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim
from fedsim.compose import compose
from fedsim.data import Dataset, from_arrays, next_tokens
from fedsim.tasks.metrics import METRICS
from tests.reference.clients import Modules
from tests.reference.fedavg import fedavg

COUNTS = [9, 4, 1, 14, 7]
HELD = 12
RNG = np.random.default_rng(5)
N = sum(COUNTS)
OWNERS = [f"client {i}" for i, n in enumerate(COUNTS) for _ in range(n)]
X = RNG.normal(size=(N + HELD, 6)).astype(np.float32)
NUMBERS = np.stack([X @ RNG.normal(size=6) + 3, np.abs(X).sum(1)], 1).astype(np.float32)
TOKENS = RNG.integers(0, 11, size=(N + HELD, 8))
MASK = (np.arange(8) < RNG.integers(3, 9, size=N + HELD)[:, None]).astype(int)


def _split(x: Any, y: Any) -> Dataset:
    first, last = slice(N), slice(N, None)
    cut = (lambda v, at: {k: t[at] for k, t in v.items()}) if isinstance(x, dict) else (lambda v, at: v[at])
    given = (None, None) if y is None else (y[first], y[last])
    return from_arrays(cut(x, first), given[0], cut(x, last), given[1], clients=OWNERS)


def numbers() -> Dataset:
    return _split(X, NUMBERS)


def one_number() -> Dataset:
    return _split(X, NUMBERS[:, 0])


def labels() -> Dataset:
    return _split(X, (NUMBERS @ np.array([[1.0, 0, 1], [0, 1, -1]]) > [3, 5, 0]).astype(int))


def tokens() -> Dataset:
    return _split({"input_ids": TOKENS, "attention_mask": MASK}, None)


class Words(nn.Module):
    """The mean of the words so far, padding left out; its result is a dictionary, as Hugging Face's models give."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(num_classes, 5), nn.Linear(5, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        here = attention_mask.unsqueeze(-1).to(self.embed.weight.dtype)
        so_far = (self.embed(input_ids) * here).cumsum(1) / here.cumsum(1).clamp(min=1)
        return {"hidden": so_far, "logits": self.head(torch.tanh(so_far))}


def _tokens_loss(made: dict[str, Tensor], targets: Tensor) -> Tensor:
    """The mean over samples of their mean over positions that count, one sample after the other."""
    each = [F.cross_entropy(z, t, ignore_index=-100) for z, t in zip(made["logits"], targets, strict=True)]
    return torch.stack(each).mean()


TWINS: dict[str, Any] = {
    "regression": (numbers, {"name": "mlp", "hidden": [5]}, {}, F.mse_loss),
    "regression by huber": (one_number, "logistic", {"loss": {"name": "huber", "delta": 0.5}}, None),
    "multilabel": (labels, {"name": "mlp", "hidden": [5]}, {}, F.binary_cross_entropy_with_logits),
    "language_model": (tokens, f"{__name__}:Words", {}, _tokens_loss),
}


def _config(name: str, rounds: int = 4, engine: str = "stacked") -> dict[str, Any]:
    data, model, more, _ = TWINS[name]
    return {
        "rounds": rounds,
        "task": {"name": name.split()[0], "dataset": f"{__name__}:{data.__name__}", "model": model, **more},
        "partition": "natural",
        "strategy": {"name": "fedavg", "cohort_size": 4},
        "local": {"epochs": 2, "batch_size": 5, "optimizer": {"name": "sgd", "lr": 0.1}},
        "evaluate": {"every": rounds},
        "runtime": {"stack": 3, "workers": 1, "engine": engine},
    }


@pytest.mark.parametrize("name", TWINS)
def test_a_preset_equals_a_plain_loop_of_autograd(name: str) -> None:
    loss = TWINS[name][3] or (lambda z, y: F.huber_loss(z[:, 0], y, delta=0.5))
    run = compose(_config(name), "test")
    task = run.experiment.task
    rows = [slice(a, a + n) for a, n in zip(np.cumsum([0, *COUNTS[:-1]]).tolist(), COUNTS, strict=True)]
    inputs, targets = task.data.inputs, task.data.targets
    mine = [{k: t[r] for k, t in inputs.items()} if isinstance(inputs, dict) else inputs[r] for r in rows]
    twin = Modules(task.module, mine, [targets[r] for r in rows], 5, epochs=2, loss=loss)
    expected = fedavg(twin, task.x0, 4, eta=0.1, size=4)
    state, experiment = experiment_state(run)
    torch.testing.assert_close(state.x, expected[-1], rtol=1e-4, atol=1e-5)
    assert (expected[-1] - task.x0).abs().max() > 1e-2
    run.close()


def experiment_state(run: Any) -> tuple[Any, Any]:
    """(the strategy's state after the run's rounds, the experiment)."""
    from fedsim.strategy import step
    from fedsim.streams import server_rng

    e = run.experiment
    state = e.strategy.init(e.task.init(e.seed))
    for number in range(e.rounds):
        state, _ = step(e.strategy, state, e.fleet, server_rng(e.seed, "server", number))
        e.fleet.end_round()
    return state, e


@pytest.mark.parametrize("name", ["regression", "multilabel", "language_model"])
def test_engines_agree_on_a_preset(name: str) -> None:
    found = [fedsim.run(_config(name, 2, engine)).rows[-1] for engine in ("loop", "stacked")]
    names = {key for key in found[0] if key.startswith(("test_", "train_", "client_"))}
    assert len(names) >= 8
    for key in names:
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4, abs=1e-5), key


def _outputs(run: Any, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(what the module gives for the held-out samples, their targets)."""
    task = run.experiment.task
    module = task.module
    nn.utils.vector_to_parameters(x.clone(), module.parameters())
    held = task.data.test_inputs
    with torch.no_grad():
        made = module(**held)["logits"] if isinstance(held, dict) else module(held)
    return made.numpy(), task.data.test_targets.numpy()


def test_metrics_of_numbers_are_those_of_scikit_learn() -> None:
    run = compose(_config("regression"), "test")
    z, y = _outputs(run, run.experiment.task.x0)
    found = run.experiment.task.evaluate(run.experiment.task.x0, run.executor)
    assert found == pytest.approx(
        {
            "test_loss": sk.mean_squared_error(y, z),
            "test_mae": sk.mean_absolute_error(y, z),
            "test_rmse": math.sqrt(sk.mean_squared_error(y, z)),
            "test_r2": sk.r2_score(y, z),
        },
        rel=1e-5,
    )
    by_client = run.experiment.task.evaluate_clients(run.experiment.task.x0, run.executor)
    assert set(by_client) == {"loss", "mae", "rmse"}  # an R2 of all is no mean of clients' R2s
    torch.testing.assert_close(by_client["rmse"], by_client["loss"].sqrt())
    run.close()


def test_metrics_of_labels_are_those_of_scikit_learn() -> None:
    run = compose(_config("multilabel"), "test")
    z, y = _outputs(run, run.experiment.task.x0)
    found = run.experiment.task.evaluate(run.experiment.task.x0, run.executor)
    assert found["test_label_accuracy"] == pytest.approx(np.mean((z > 0) == y))
    assert found["test_exact_match"] == pytest.approx(sk.accuracy_score(y, z > 0))
    assert found["test_f1"] == pytest.approx(sk.f1_score(y, z > 0, average="micro"))
    assert found["test_loss"] == pytest.approx(sk.log_loss(y.ravel(), 1 / (1 + np.exp(-z.ravel()))), rel=1e-5)
    run.close()


def test_perplexity_is_over_all_positions_that_count() -> None:
    run = compose(_config("language_model"), "test")
    z, y = (torch.from_numpy(part) for part in _outputs(run, run.experiment.task.x0))
    found = run.experiment.task.evaluate(run.experiment.task.x0, run.executor)
    counts = y != -100
    assert int(counts.sum()) == int(MASK[N:, 1:].sum()) < counts.numel() - len(counts)
    mean = F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100)
    assert found["test_perplexity"] == pytest.approx(float(mean.exp()), rel=1e-5)
    right = (z.argmax(-1) == y)[counts].double().mean()
    assert found["test_token_accuracy"] == pytest.approx(float(right))
    run.close()


def test_without_labels_anywhere_f1_has_no_value_and_the_run_goes_on() -> None:
    none = METRICS["f1"].parts(torch.full((3, 2), -1.0), torch.zeros(3, 2))
    assert METRICS["f1"].value(none[0].sum(), none[1].sum()).isnan()
    config = _config("multilabel", 2)
    config["task"]["dataset"] = f"{__name__}:nothing_there"
    config["local"]["optimizer"]["lr"] = 1.0
    row = fedsim.run(config).rows[-1]
    assert math.isnan(row["test_f1"]) and row["test_label_accuracy"] == 1.0 and row["client_f1_mean"] == 0.0


def correlation(outputs: Tensor, targets: Tensor) -> float:
    """One number for all samples, which outputs that are all the same have none of."""
    return float("nan") if len(outputs) == HELD else 0.5


def precision(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    found = outputs > 9
    return (found & (targets > 0.5)).sum(1), found.sum(1)


@pytest.mark.parametrize("name", ["correlation", "precision"])
def test_a_metric_without_a_value_is_no_divergence_and_nothing_that_rows_lack(name: str) -> None:
    config = _config("multilabel", 2) | {"evaluate": {"every": 1}, "checkpoint": {"best": f"test_{name}"}}
    config["task"]["metrics"] = [f"{__name__}:{name}"]
    rows = fedsim.run(config | {"stop": {f"test_{name}": 0.9}}).rows
    assert len(rows) == 2 and all(math.isnan(row[f"test_{name}"]) for row in rows)


def test_r2_is_over_numbers_that_vary() -> None:
    z, y = torch.tensor([[1.0, 5.0], [2.0, 4.0], [4.0, 5.0]]), torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    assert float(METRICS["r2"](z, y)) == pytest.approx(sk.r2_score(y[:, 0], z[:, 0]))
    assert METRICS["r2"](z[:, 1], y[:, 1]).isnan()


def nothing_there() -> Dataset:
    y = np.zeros((N + HELD, 2))
    y[0] = 1  # one client has labels, which the model does not find
    return _split(X * 0.01, y)


def test_where_every_position_counts_the_loss_is_that_of_classes() -> None:
    config = _config("language_model") | {"partition": "iid", "clients": {"count": 5}}
    config["task"] |= {"dataset": f"{__name__}:full", "model": "char_lstm"}
    run = compose(config, "test")
    assert run.experiment.task.sample_loss.__name__ == "cross_entropy"
    run.close()


def full() -> tuple[np.ndarray, np.ndarray]:
    return TOKENS[:, :-1], TOKENS[:, 1:]


def padded_test() -> tuple[np.ndarray, ...]:
    """Positions that do not count stand in held-out rows alone."""
    y = TOKENS[:, 1:].copy()
    y[N:, 4:] = -100
    return TOKENS[:N, :-1], y[:N], TOKENS[N:, :-1], y[N:]


def test_positions_that_do_not_count_may_stand_in_held_out_rows_alone() -> None:
    config = _config("language_model") | {"partition": "iid", "clients": {"count": 5}}
    config["task"] |= {"dataset": f"{__name__}:padded_test", "model": {"name": "char_lstm", "hidden": 4, "layers": 1}}
    run = compose(config, "test")
    found = run.experiment.task.evaluate(run.experiment.task.x0, run.executor)
    assert math.exp(found["test_loss"]) == pytest.approx(found["test_perplexity"])  # all rows count as often
    run.close()
    config["task"]["name"] = "classification"
    with pytest.raises(fedsim.ConfigError, match="some of its labels are -100.*language_model"):
        compose(config, "test")


def test_targets_of_a_language_model_are_the_next_tokens() -> None:
    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 0, 0]])
    assert next_tokens(ids).tolist() == [[1, 4, 1, -100], [9, 0, 0, -100]]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert next_tokens({"input_ids": ids, "attention_mask": mask}).tolist()[1] == [9, -100, -100, -100]
    assert from_arrays(ids.numpy(), test_fraction=0.0).num_classes == 10  # 5 is only ever a first word


def per_row(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs()


def scalar(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean()


def words(outputs: Tensor, targets: Tensor) -> str:
    return "good"


def table(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.ones(7)


def near(outputs: Tensor, targets: Tensor, *, within: float = 1.0) -> float:
    """Share of numbers that are near."""
    return float(((outputs - targets).abs() < within).float().mean())


def test_losses_and_metrics_of_ones_own_are_as_good_as_those_of_the_table() -> None:
    ours, theirs = _config("regression", 2), _config("regression", 2)
    ours["task"] |= {"loss": "mae", "metrics": ["mse"]}
    theirs["task"]["loss"] = {"name": "torch.nn:L1Loss", "reduction": "none"}
    theirs["task"]["metrics"] = [
        {"name": f"{__name__}:near", "within": 0.5, "as": "nearly"},
        f"{__name__}:per_row",
        {"name": "torch.nn.functional:mse_loss", "as": "error"},
    ]
    ours, theirs = compose(ours, "test"), compose(theirs, "test")
    a, b = (run.experiment.task for run in (ours, theirs))
    assert torch.equal(experiment_state(ours)[0].x, experiment_state(theirs)[0].x)
    z, y = _outputs(theirs, b.x0)
    found, table = (task.evaluate(b.x0, ours.executor) for task in (b, a))
    assert found["test_loss"] == table["test_loss"] and found["test_error"] == pytest.approx(table["test_mse"])
    assert found["test_nearly"] == pytest.approx(np.mean(np.abs(z - y) < 0.5))
    assert found["test_per_row"] == pytest.approx(np.mean(np.abs(z - y)))
    assert theirs.resolved["task"]["metrics"][0] == {"name": f"{__name__}:near", "as": "nearly", "within": 0.5}
    ours.close(), theirs.close()


class Gathered:
    """The mean over all that it was given since it was reset, as torchmetrics' classes keep it."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def reset(self) -> None:
        self.values.clear()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.values.append((outputs - targets).abs().mean(1))

    def compute(self) -> Tensor:
        return torch.cat(self.values).mean()

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("adds to what it has")


def test_a_metric_that_gathers_is_taken_of_each_evaluation_alone() -> None:
    config = _config("regression")
    config["task"]["metrics"] = ["mae", {"name": Gathered, "as": "gathered"}]
    rows = [row for row in fedsim.run(config, rounds=2, **{"evaluate.every": 1}).rows]
    assert rows[0]["test_mae"] != rows[1]["test_mae"]
    assert all(row["test_gathered"] == pytest.approx(row["test_mae"]) for row in rows)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"loss": f"{__name__}:scalar"}, r'task.loss: gives a tensor \[\] .* one number for each .*reduction="none"'),
        ({"loss": "torch.nn.functional:mse_loss"}, r'task.loss: gives a tensor \[\].*reduction="none"'),
        ({"loss": f"{__name__}:words"}, "task.loss: can't take the model's outputs"),
        ({"loss": "cross_entropy"}, "cross_entropy takes classes, but the targets are float32"),
        ({"loss": {"name": "huber", "delt": 1.0}}, "task.loss.delt: unknown key; did you mean 'delta'"),
        ({"loss": "msa"}, "task.loss.name: unknown name 'msa'; did you mean 'ms"),
        ({"metrics": [f"{__name__}:words"]}, "task.metrics: words gives a str for [23] samples; it must give a number"),
        ({"metrics": [f"{__name__}:table"]}, r"task.metrics: table gives a tensor \[7\]"),
        ({"metrics": ["accuracy"]}, "task.metrics: accuracy can't take the model's outputs"),
        (
            {"dataset": f"{__name__}:one_number", "model": "logistic", "metrics": ["accuracy"]},
            "accuracy can't take the model's outputs .*targets are numbers, not classes",
        ),
        ({"metrics": ["mae", "mae"]}, "two metrics are called 'mae'; give one another name"),
        (
            {"metrics": ["mae", {"name": "mse", "as": "mae_std"}]},
            "'mae_std' is what rows call the spread of 'mae' over clients; .* as: std_of_mae}",
        ),
        ({"metrics": [{"name": "mae", "as": "loss_worst_decile"}]}, "spread of 'loss' over clients"),
        ({"metrics": [{"name": "mae", "as": "loss"}]}, r"metrics\[0\].as: expected a name for the row"),
        ({"metrics": "mae"}, r"task.metrics: expected a list such as \[accuracy\], got 'mae'"),
        ({"model": f"{__name__}:Tangled"}, "task.model: the model gives a str; return a tensor, a tuple"),
        ({"model": f"{__name__}:Narrow"}, r"task.model: gives \(3, 1\) for 3 samples where \(3, 2\) is needed"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(task: dict[str, Any], message: str) -> None:
    config = _config("regression")
    config["task"] |= task
    with pytest.raises(fedsim.ConfigError, match=message):
        compose(config, "test")


class Tangled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 2)

    def forward(self, x: Tensor) -> Any:
        return "three"


class Narrow(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 1)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("classification", "numbers", "its targets are numbers, float32.*take task.name: regression"),
        ("classification", "tokens", "some of its labels are -100.*language_model"),
        ("multilabel", "numbers", "multilabel takes 1 or 0 for each label"),
        ("language_model", "numbers", "its targets are numbers"),
    ],
)
def test_targets_of_another_kind_are_refused_with_the_task_that_takes_them(name: str, data: str, message: str) -> None:
    config = _config("regression")
    config["task"] |= {"name": name, "dataset": f"{__name__}:{data}"}
    with pytest.raises(fedsim.ConfigError, match=f"task.dataset: .*{message}"):
        compose(config, "test")


@pytest.mark.parametrize("partition", ["shards", {"name": "dirichlet", "alpha": 1.0}])
def test_partitions_by_class_refuse_numbers_and_name_those_that_work(partition: Any) -> None:
    config = _config("regression") | {"partition": partition, "clients": {"count": 3}}
    with pytest.raises(
        fedsim.ConfigError, match="rows of this data are numbers, .* choose iid, quantity_skew or natural"
    ):
        compose(config, "test")


def test_flipped_labels_need_labels() -> None:
    config = _config("regression")
    config["clients"] = {"byzantine": {"attack": "label_flip", "count": 1}}
    with pytest.raises(fedsim.ConfigError, match="byzantine.attack: poisons labels, .* not all classes"):
        compose(config, "test")


def shaped(input_shape: dict[str, tuple[int, ...]], num_classes: int) -> nn.Module:
    assert input_shape == {"a": (3,), "b": (3,)}
    return Normed(num_classes)


def test_a_model_that_asks_for_several_shapes_is_made_again_from_its_folder(tmp_path: Path) -> None:
    here = f"{__name__}:"
    task = {"name": "classification", "dataset": f"{here}pairs", "model": f"{here}shaped"}
    made = fedsim.run({"task": task, "rounds": 1, "clients": {"count": 3}}, out=tmp_path / "run").model
    again = fedsim.History.load(tmp_path / "run").model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())


class Normed(nn.Module):
    """Named inputs, and statistics that a pass in training mode would move."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, num_classes)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(self.norm(a + b))


def pairs() -> Dataset:
    rng = np.random.default_rng(0)
    x = {k: rng.normal(3.0, 2.0, (40, 3)).astype(np.float32) for k in "ab"}
    return from_arrays(x, rng.integers(0, 2, 40))


def test_the_trial_of_a_model_leaves_its_start_as_it_was() -> None:
    here = f"{__name__}:"
    task = {"name": "classification", "dataset": f"{here}pairs", "model": f"{here}Normed"}
    composition = compose({"task": task, "clients": {"count": 3}}, "x.yaml")
    x0 = composition.experiment.task.layout.views(composition.experiment.task.init(0))
    composition.close()
    assert float(x0["norm.running_mean"].abs().sum()) == 0 and bool((x0["norm.running_var"] == 1).all())
