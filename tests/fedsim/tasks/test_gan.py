"""GANs: each player's own gradient by autograd, the Dirac-GAN in closed form, keyed noise, and Frechet's distance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.data.federated import FederatedData
from fedsim.engine import build_engine
from fedsim.history import History
from fedsim.params import Layout
from fedsim.runs import run
from fedsim.strategies.extragradient import Extragradient
from fedsim.strategies.fedavg import FedAvg
from fedsim.task import Schedule
from fedsim.tasks.gan import LOSSES, GanTask, Players, frechet_distance, with_noise
from tests.build import Play, local_sgd, streams, task_and_pool

MLP = {"name": "mlp", "hidden": [5]}
WGAN = {"loss": "wasserstein", "prox": {"name": "box", "low": -0.1, "high": 0.1}}


def raw(**task: Any) -> dict[str, Any]:
    return {
        "rounds": 2,
        "task": {"name": "gan", "generator": MLP, "discriminator": MLP, "latent": 3, **task},
        "partition": "iid",
        "clients": {"count": 10},
        "strategy": {"name": "extragradient", "lr": 0.1},
    }


def made(**task: Any) -> AbstractContextManager[tuple[GanTask, Any]]:
    """(the task of a file, a pool to evaluate on)."""
    return task_and_pool(raw(**task), GanTask)


def batch_of(task: GanTask, ids: list[int], size: int = 4, job: int = 0) -> Any:
    clients = torch.tensor(ids)
    return task.batches(clients, streams(clients, job), Schedule(steps=1, epochs=None, batch_size=size))[0]


# The operator ----------------------------------------------------------------------------------------------------


def _linear(own: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    return x @ own[f"{prefix}.weight"].T + own[f"{prefix}.bias"]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("clients", [1, 3])  # a lone client is computed another way than a stack
def test_each_player_goes_down_its_own_loss(kind: str, clients: int) -> None:
    with made(**(WGAN if kind == "wasserstein" else {})) as (task, _):
        x = 0.4 * torch.randn(clients, task.layout.size, generator=torch.Generator().manual_seed(1))
        batch = batch_of(task, [3, 0, 7][:clients])
        f, loss = task.field(x, batch)
        for c in range(clients):
            own = {k: v.double().requires_grad_() for k, v in task.layout.views(x[c]).items()}
            real, noise = (batch.inputs[k][c].double().flatten(1) for k in ("real", "noise"))
            hidden = _linear(own, "generator.0.1", noise).relu()
            fake = _linear(own, "generator.0.3", hidden).sigmoid()  # digits lie in [0, 1]

            def judged(images: Tensor, own: dict[str, Tensor] = own) -> Tensor:
                return _linear(own, "discriminator.3", _linear(own, "discriminator.1", images).relu())

            if kind == "wasserstein":
                losses = {"discriminator": (judged(fake) - judged(real)).mean(), "generator": -judged(fake).mean()}
            else:
                told = F.logsigmoid(judged(real)) + torch.log(1 - judged(fake).sigmoid())
                losses = {"discriminator": -told.mean(), "generator": -F.logsigmoid(judged(fake)).mean()}
            assert float(loss[c]) == pytest.approx(float(sum(losses.values()).detach()), abs=1e-5)
            got = task.layout.views(f[c])
            for player, value in losses.items():
                names = [name for name in own if name.startswith(player)]
                slopes = torch.autograd.grad(value, [own[n] for n in names], retain_graph=True)
                for name, g in zip(names, slopes, strict=True):
                    torch.testing.assert_close(got[name].double(), g, rtol=0, atol=2e-6)


class Point(nn.Module):
    """A generator of one point, whatever the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.theta.expand(len(noise), 1)


def dirac(kind: str) -> GanTask:
    """Mescheder, Geiger, Nowozin. arXiv:1801.04406, definition 2.1: data at 0, one number for each player."""
    module = Players(Point(), nn.Linear(1, 1, bias=False))
    data = FederatedData(
        inputs=torch.zeros(4, 1),
        targets=torch.zeros(4, dtype=torch.int64),
        offsets=torch.tensor([0, 2, 4]),
        order=torch.arange(4),
        test_inputs=torch.zeros(0, 1),
        test_targets=torch.zeros(0, dtype=torch.int64),
        num_classes=1,
    )
    layout, loss = Layout.of_module(module), LOSSES[kind]
    engine = build_engine("stacked", module, layout, loss)
    return GanTask(with_noise(data, 1, 0), module, torch.tensor([1.0, 1.0]), engine, loss)


@pytest.mark.parametrize(
    "strategy, factor",
    [
        (lambda task: FedAvg(local=local_sgd(task, 0.2, steps=1)), lambda h: 1 + h**2),
        (lambda task: Extragradient(lr=0.2), lambda h: (1 - h**2) ** 2 + h**2),
    ],
    ids=["descent", "extragradient"],
)
def test_gradient_steps_spiral_away_and_extragradient_comes_in(strategy: Any, factor: Callable[[float], float]) -> None:
    # F is a quarter turn of (theta, psi): a step with it lengthens the square by 1 + h^2, one after a look ahead
    # multiplies by 1 - h^2 along and h across
    task = dirac("wasserstein")
    x = task.init(0)
    path = Play.start(task, strategy(task), x0=x).path(30)
    lengths = torch.cat([x[None], path]).square().sum(1)
    torch.testing.assert_close(lengths[1:] / lengths[:-1], torch.full((30,), factor(0.2)), rtol=0, atol=1e-5)


def test_the_non_saturating_dirac_gan_turns_as_its_formula_says() -> None:
    task = dirac("non_saturating")
    z = torch.tensor([[0.7, -0.4], [-0.2, 0.9]])  # theta, psi
    f, _ = task.field(z, batch_of(task, [0, 1], size=2))
    theta, psi = z.T
    expected = torch.stack([-psi * torch.sigmoid(-psi * theta), theta * torch.sigmoid(psi * theta)], 1)
    torch.testing.assert_close(f, expected, rtol=0, atol=1e-6)


# Noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_a_samples_own_and_new_with_every_job() -> None:
    with made() as (task, _):
        first = batch_of(task, [3, 0, 7]).inputs["noise"]
        assert torch.equal(first[1], batch_of(task, [0]).inputs["noise"][0])  # alone as in a stack
        assert torch.equal(first[:, :2], batch_of(task, [3, 0, 7], size=2).inputs["noise"])  # however long the batch
        assert len(torch.cat([first, batch_of(task, [3, 0, 7], job=1).inputs["noise"]]).unique()) == 2 * 3 * 4 * 3
        many = batch_of(task, list(range(10)), size=100).inputs["noise"].double()
        assert abs(float(many.mean())) < 0.06 and abs(float(many.square().mean()) - 1) < 0.08  # 4 errors of 3,000


# Evaluation ------------------------------------------------------------------------------------------------------


def test_frechet_distance_is_that_of_scipys_square_root() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 4)), 1 + rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4))
    s, t = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(a) + 2) == pytest.approx(16.0)


def test_an_evaluation_takes_the_generator_as_it_is_trained() -> None:
    with made() as (task, pool):
        x = task.init(0) + 0.1
        found, test = task.evaluate(x, pool), task.data.test_inputs
        own = task.layout.views(x)
        hidden = _linear(own, "generator.0.1", test["noise"]).relu()  # type: ignore[index]
        fake = _linear(own, "generator.0.3", hidden).sigmoid()
        assert found["test_frechet_distance"] == pytest.approx(frechet_distance(fake, test["real"]), rel=1e-4)  # type: ignore[index]
        assert found["test_loss"] == pytest.approx(found["test_generator_loss"] + found["test_discriminator_loss"])


def test_training_brings_samples_closer_to_the_data() -> None:
    file = raw(latent=8, generator={"name": "mlp", "hidden": [32]}, discriminator={"name": "mlp", "hidden": [32]})
    file |= {"strategy": {"name": "fedavg"}, "evaluate": {"every": 12, "per_client": False}}
    file["local"] = {"steps": 10, "batch_size": 20, "optimizer": {"name": "adam", "lr": 0.005, "beta1": 0.5}}
    with made(latent=8, generator=file["task"]["generator"]) as (task, pool):
        before = task.evaluate(task.init(0), pool)["test_frechet_distance"]
    assert run(file, rounds=12).last("test_frechet_distance") < 0.6 * before


@pytest.mark.pictures
def test_a_run_shows_samples_also_after_a_resume_and_its_model_is_read_back(tmp_path: Any) -> None:
    whole = run(raw(), rounds=3, out=tmp_path / "whole")
    run(raw(), rounds=2, out=tmp_path / "run")
    history = run(raw(), rounds=3, out=tmp_path / "run", resume=True)
    pictures = [np.load(tmp_path / name / "pictures.npz") for name in ("whole", "run")]
    assert pictures[0].files == ["Samples of the generator", "Samples of the data"]
    for name in pictures[0].files:
        assert pictures[0][name].shape == (4, 10, 8, 8, 1)
        assert np.array_equal(pictures[0][name], pictures[1][name])
    assert "Samples of the generator" in (tmp_path / "run" / "report.html").read_text()
    assert whole.last("test_frechet_distance") == history.last("test_frechet_distance")
    again, noise = History.load(tmp_path / "run").model, torch.ones(2, 3)
    assert torch.equal(again.generator(noise), history.model.generator(noise))  # type: ignore[operator]


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, message",
    [
        ({"loss": "wasserstein"}, "task: loss wasserstein has no end .* set task.prox"),
        ({"latent": 0}, "task: latent must be at least 1"),
        ({"dataset": "shakespeare"}, "task.dataset: a GAN needs samples that are one tensor of numbers"),
        ({"generator": "resnet"}, "task.*resnet"),
        (
            {"discriminator": {"name": "tests.fedsim.tasks.test_gan:two_numbers"}},
            r"discriminator: makes \[2, 2\] of 2 inputs, and 2 numbers",
        ),
    ],
)
def test_what_does_not_fit_is_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(raw(**task), "x.yaml")


def two_numbers(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A discriminator that can't decide."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def test_a_box_for_the_discriminator_leaves_the_generator_free() -> None:
    with made(**WGAN) as (task, _):
        z = task.layout.views(task.prox(torch.ones(task.layout.size), 0.1))
        assert {name.split(".")[0]: float(v.max()) for name, v in z.items()} == {
            "generator": 1.0,
            "discriminator": pytest.approx(0.1),
        }


def test_labels_are_nothing_to_poison_and_a_loss_nothing_to_minimise() -> None:
    file = {**raw(), "clients": {"count": 10, "byzantine": {"attack": {"name": "label_flip"}, "count": 2}}}
    with pytest.raises(ConfigError, match="does not look at"):
        compose({**file, "strategy": {"name": "fedavg"}, "local": {"steps": 1}}, "x.yaml")
    with pytest.raises(ConfigError, match="two players have no loss in common"):
        local = {"steps": 1, "optimizer": {"name": "mezo", "lr": 0.1}}
        compose({**raw(), "strategy": {"name": "fedavg"}, "local": local}, "x.yaml")
