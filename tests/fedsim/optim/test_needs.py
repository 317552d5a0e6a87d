"""What the training loop supplies: probes of the loss, private gradients, sampled gradients, curvature."""

from __future__ import annotations

import importlib
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from fedsim.optim import build
from fedsim.optim.assemble import by_step
from fedsim.optim.needs import clip_and_sum, private_gradient, sample_factors, supply, zeroth_order_gradient
from fedsim.optim.segments import Segments
from fedsim.optim.settings import Private, ZerothOrder
from fedsim.params import Layout
from tests.build import streams
from tests.fedsim.optim.sources import CLASSES, LAYOUT, SoftmaxSource

ONES = np.ones(3, dtype=np.int64)


class Quadratic:
    """loss(x) = x^T A x / 2 with one A per client."""

    def __init__(self, clients: int = 3, size: int = 7) -> None:
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(clients, size, size, generator=generator, dtype=torch.float64)
        self.a = a + a.mT
        self.x = torch.randn(clients, size, generator=generator, dtype=torch.float64)

    def losses(self, points: Tensor) -> Tensor:
        return torch.einsum("qki,kij,qkj->qk", points, self.a, points) / 2

    def gradient(self) -> Tensor:
        return torch.einsum("kij,kj->ki", self.a, self.x)


def test_the_slope_of_a_quadratic_is_its_gradient_along_z_for_any_eps() -> None:
    q = Quadratic()
    for eps in (1e-3, 1.0):
        g, slopes = zeroth_order_gradient(q.x, q.losses, ZerothOrder(eps=eps), streams([0, 1, 2]), ONES)
        z = g / slopes
        assert torch.allclose(slopes[:, 0], (z * q.gradient()).sum(1), rtol=1e-9)


def test_the_slope_of_a_smooth_loss_tends_to_the_gradient_along_z() -> None:
    source = SoftmaxSource()
    x = source.start()
    errors = []
    for eps in (1e-2, 1e-3):
        g, slopes = zeroth_order_gradient(x, source.losses, ZerothOrder(eps=eps), streams([0, 1, 2]), ONES)
        errors.append(float((slopes[:, 0] - (g / slopes * source.grad(x)).sum(1)).abs().max()))
    assert errors[1] < 1e-5 and 50 < errors[0] / errors[1] < 200  # of second order in eps


def test_the_mean_over_directions_tends_to_the_gradient() -> None:
    q, num = Quadratic(1), 1500
    g, slopes = zeroth_order_gradient(q.x, q.losses, ZerothOrder(directions=num), streams([0]), ONES[:1])
    expected = q.gradient()
    # Var(z_i (z . g)) = |g|^2 + g_i^2
    error = ((g - expected) / ((expected.square().sum() + expected.square()) / num).sqrt()).abs()
    assert slopes.shape == (1, num) and error.max() < 4


def test_a_direction_is_keyed_by_client_job_and_step_and_not_by_row() -> None:
    q = Quadratic()

    def slopes_of(ids: list[int], t: list[int], job: int = 0) -> Tensor:
        how = ZerothOrder()
        rows = torch.tensor(ids)
        same = Quadratic()
        same.a, same.x = q.a[rows], q.x[rows]
        return zeroth_order_gradient(same.x, same.losses, how, streams(ids, job), np.array(t))[1][:, 0]

    together = slopes_of([0, 1, 2], [1, 4, 1])
    assert torch.allclose(slopes_of([2, 1], [1, 4]), together[[2, 1]], rtol=1e-12)
    assert not torch.allclose(slopes_of([2, 1], [2, 5]), together[[2, 1]])
    assert not torch.allclose(slopes_of([2, 1], [1, 4], job=1), together[[2, 1]])


def test_mezo_steps_by_slope_and_decay_and_leaves_biases_undecayed() -> None:
    source = SoftmaxSource()
    x = source.start()
    optimizer = build({"name": "mezo", "lr": 0.01, "weight_decay": 0.1, "zeroth_order": {"eps": 1e-3}}, LAYOUT)
    y, own = x.clone(), streams([0, 1, 2])
    state = optimizer.init(y)
    assert not state.buffers
    g, aux = supply(optimizer, y, state, source, streams=own)
    assert g is not None and aux["loss_eval"].shape == (3, 1) and source.asked == ["losses"]
    optimizer.step_(y, g, state, aux=aux, streams=own)
    again, _ = zeroth_order_gradient(x, source.losses, ZerothOrder(), own, ONES)
    decay = 0.1 * x * torch.cat([torch.ones(24), torch.zeros(CLASSES)])
    assert torch.allclose(y, x - 0.01 * (again + decay), rtol=0, atol=1e-14)


def test_mezo_goes_down() -> None:
    source = SoftmaxSource(clients=3)
    optimizer = build({"name": "mezo", "lr": 0.05, "zeroth_order": {"directions": 4}}, LAYOUT)
    y, own = source.start(), streams([0, 1, 2])
    state, before = optimizer.init(y), source.losses(y[None])
    for _ in range(60):
        g, aux = supply(optimizer, y, state, source, streams=own)
        assert g is not None
        optimizer.step_(y, g, state, aux=aux)
    assert (source.losses(y[None]) < 0.5 * before).all()


def test_a_client_with_an_infinite_loss_is_skipped_and_counted() -> None:
    q = Quadratic()
    q.a[1] *= 1e308
    layout = Layout.of({"w": (1, 7)})
    optimizer = build({"name": "mezo", "lr": 0.01}, layout)
    y = q.x.clone() * 1e3
    state = optimizer.init(y)
    g, slopes = zeroth_order_gradient(y, q.losses, ZerothOrder(), streams([0, 1, 2]), ONES)
    before = y.clone()
    optimizer.step_(y, g, state, aux={"loss_eval": slopes})
    assert state.skipped.tolist() == [0, 1, 0] and torch.equal(y[1], before[1]) and not torch.equal(y[0], before[0])


def test_without_bound_and_noise_the_private_gradient_is_the_mean_gradient() -> None:
    source = SoftmaxSource()
    x = source.start()
    optimizer = build({"name": "sgd", "lr": 0.1, "dp": {"clip": float("inf")}}, LAYOUT)
    g, aux = supply(optimizer, x, optimizer.init(x), source, streams=streams([0, 1, 2]))
    assert g is not None and aux["per_sample_norms"].tolist() == [float("inf")]
    assert torch.allclose(g, source.grad(x), rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore")
def test_private_sgd_equals_opacus_with_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus")
    module = importlib.import_module("opacus.optimizers.optimizer")
    source, own = SoftmaxSource(), streams([0, 1, 2])
    x = source.start()
    spec = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "dp": {"clip": 0.7, "noise": 1.3, "batch_size": 5.0}}
    optimizer, y = build(spec, LAYOUT), x.clone()
    state = optimizer.init(y)
    clients = [[nn.Parameter(v.clone()) for v in LAYOUT.views(row).values()] for row in x]
    theirs = [
        module.DPOptimizer(optim.SGD(params, 0.1, 0.9), noise_multiplier=1.3, max_grad_norm=0.7, expected_batch_size=5)
        for params in clients
    ]
    for step in range(1, 5):
        per_sample = source.per_sample(y)
        z = own.normal("optimizer dp", LAYOUT.size, step=step, dtype=torch.float64)
        for client, params in enumerate(clients):
            for p, v in zip(params, LAYOUT.views(per_sample[client]).values(), strict=True):
                p.grad_sample = v.clone()  # type: ignore[attr-defined]
                p.grad = None
            draws = iter(LAYOUT.views(z[client]).values())
            monkeypatch.setattr(module, "_generate_noise", lambda std, draws=draws, **_: std * next(draws))
            theirs[client].step()
            theirs[client].zero_grad()
        g, aux = supply(optimizer, y, state, source, streams=own)
        assert g is not None
        optimizer.step_(y, g, state, aux=aux)
    expected = torch.stack([torch.cat([p.detach().flatten() for p in params]) for params in clients])
    assert torch.allclose(y, expected, rtol=0, atol=2e-15)


def test_bounds_per_tensor_clip_each_tensors_own_norm() -> None:
    source = SoftmaxSource()
    x = source.start()
    spec = {"name": "sgd", "lr": 0.1, "dp": {"clip": {"w": 0.3, "b": 0.1}}}
    optimizer = build(spec, LAYOUT)
    g, _ = supply(optimizer, x, optimizer.init(x), source, streams=streams([0, 1, 2]))
    assert g is not None
    for client, rows in enumerate(source.per_sample(x)):
        total = {"w": torch.zeros(CLASSES, 6, dtype=x.dtype), "b": torch.zeros(CLASSES, dtype=x.dtype)}
        for row in rows:
            for (name, v), bound in zip(LAYOUT.views(row).items(), (0.3, 0.1), strict=True):
                total[name] += v * min(1.0, bound / (float(v.norm()) + 1e-6))
        for name, view in LAYOUT.views(g[client]).items():
            assert torch.allclose(view, total[name] / 5, rtol=0, atol=1e-15)


def test_noise_goes_with_the_bound_the_multiplier_and_the_batch() -> None:
    class Nothing(SoftmaxSource):
        """A batch that Poisson sampling left empty."""

        def clipped_sum(self, x: Tensor, bounds: Tensor) -> Tensor:
            return torch.zeros_like(x)

        def batch_sizes(self) -> Tensor:
            return torch.zeros(1)

    x, own, t = torch.zeros(1, 40_000), streams([0]), ONES[:1]
    for bounds, deviation in (((2.0,), 2.0), ((3.0, 4.0), 5.0)):
        how = Private(clip=1.0, noise=0.5, batch_size=10.0)
        g = private_gradient(x, Nothing(1), how, torch.tensor(bounds), own, t)
        expected = 0.5 * deviation / 10
        assert abs(g.std() / expected - 1) < 4 / sqrt(2 * 40_000) and abs(g.mean()) < 4 * expected / sqrt(40_000)
        twice = Private(clip=1.0, noise=1.0, batch_size=10.0)
        assert torch.allclose(private_gradient(x, Nothing(1), twice, torch.tensor(bounds), own, t), 2 * g, rtol=1e-6)
    own_size = private_gradient(x, Nothing(1), Private(clip=1.0, noise=0.5), torch.tensor([2.0]), own, t)
    assert torch.isfinite(own_size).all()


def test_noise_belongs_to_a_client_and_its_step() -> None:
    x = torch.zeros(3, 50)

    def draw(ids: list[int], t: list[int]) -> Tensor:
        return by_step(streams(ids), np.array(t), x[: len(ids)], "noise")

    together = draw([7, 8, 9], [1, 2, 1])
    assert torch.equal(draw([9, 8], [1, 2]), together[[2, 1]])
    assert not torch.equal(draw([9], [2])[0], together[2])


def test_a_prefix_of_the_stack_is_supplied_like_the_whole() -> None:
    for spec in (
        {"name": "mezo", "lr": 0.1},
        {"name": "sgd", "lr": 0.1, "dp": {"clip": 0.5, "noise": 1.0}},
    ):
        source = SoftmaxSource()
        x, optimizer = source.start(), build(spec, LAYOUT)
        state = optimizer.init(x)
        whole, _ = supply(optimizer, x, state, source, streams=streams([0, 1, 2]))
        source.batch_sizes = lambda: torch.full((2,), 5)  # type: ignore[method-assign]
        source.targets, source.inputs = source.targets[:2], source.inputs[:2]
        some, _ = supply(optimizer, x[:2], state, source, streams=streams([0, 1]))
        assert whole is not None and some is not None
        assert torch.allclose(some, whole[:2], rtol=1e-12)


def test_sophia_gets_a_sampled_gradient_clipped_like_the_gradient_and_the_batch_size() -> None:
    source = SoftmaxSource()
    x = source.start()
    optimizer = build({"name": "sophia_g", "clip": {"global": 0.1}, "every": 2}, LAYOUT)
    state = optimizer.init(x)
    g, aux = supply(optimizer, x, state, source, streams=streams([0, 1, 2]))
    assert g is None and source.asked == ["sampled_grad"]
    assert torch.allclose(aux["sampled_grad"].norm(dim=1), torch.full((3,), 0.1, dtype=x.dtype), rtol=1e-4)
    assert aux["batch_size"].tolist() == [[5.0]] * 3
    optimizer.step_(x, source.grad(x), state, aux=aux)
    assert supply(optimizer, x, state, source, streams=streams([0, 1, 2])) == (None, {})


def test_the_square_of_a_sampled_gradient_is_the_gauss_newton_diagonal_on_average() -> None:
    """For one sample, summed over labels with their chances, exactly (Bartlett)."""
    source = SoftmaxSource(samples=1)
    x = source.start()
    chances = source.logits(x).softmax(-1)[:, 0]
    squares = torch.zeros_like(x)
    for label in range(CLASSES):
        g = source.grad(x, torch.full((3, 1), label))
        squares += chances[:, label, None] * g.square()
    for client in range(3):
        features = torch.cat([source.inputs[client, 0], torch.ones(1, dtype=x.dtype)])
        p = chances[client]
        diagonal = (p * (1 - p))[:, None] * features.square()
        expected = torch.cat([diagonal[:, :-1].flatten(), diagonal[:, -1]])
        assert torch.allclose(squares[client], expected, rtol=0, atol=1e-15)


def test_hutchinsons_product_is_the_curvature_on_average() -> None:
    source = SoftmaxSource()
    x = source.start()
    optimizer = build({"name": "sophia_h"}, LAYOUT)
    state = optimizer.init(x)
    eye = torch.eye(LAYOUT.size, dtype=x.dtype)
    hessian = torch.stack([source.hvp(x, row.expand_as(x)) for row in eye], 1)  # [k, P, P]
    total, num = torch.zeros_like(x), 300
    for job in range(num):
        _, aux = supply(optimizer, x, state, source, streams=streams([0, 1, 2], job))
        total += aux["hvp"]
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    spread = (hessian.square().sum(2) - diagonal.square()).clamp(min=1e-12)
    assert ((total / num - diagonal).abs() < 4.5 * (spread / num).sqrt()).all()


def test_factors_by_hand() -> None:
    squares = torch.tensor([[[9.0, 16.0], [0.0, 0.25]]])
    assert torch.allclose(sample_factors(squares, torch.tensor([1.0])), torch.tensor([[[0.2, 0.2], [1.0, 1.0]]]))
    assert torch.allclose(sample_factors(squares, torch.tensor([1.0, 2.0])), torch.tensor([[[1 / 3, 0.5], [1.0, 1.0]]]))
    rows = torch.tensor([[[3.0, 0.0, 4.0], [0.0, 0.0, 0.5]]])
    total = clip_and_sum(rows, torch.tensor([1.0]), Segments((2, 1)))
    assert torch.allclose(total, torch.tensor([[0.6, 0.0, 1.3]]))
