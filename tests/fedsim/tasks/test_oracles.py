"""What tasks supply beside a gradient, against the plain engine's losses and gradients, client by client."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedsim.data.federated import FederatedData
from fedsim.engine import Batch
from fedsim.engine.loop import LoopEngine
from fedsim.engine.losses import LOSSES
from fedsim.optim import build
from fedsim.optim.needs import check_needs, sample_factors
from fedsim.task import Task
from fedsim.tasks import samples
from fedsim.tasks.formula import FormulaBatch
from fedsim.tasks.models import MODELS
from fedsim.tasks.supervised import SupervisedTask
from tests.build import drawn, saddle
from tests.fedsim.engine import zoo

COUNTS = [4, 4, 2]
RULES = {
    "loss_eval": {"name": "mezo", "lr": 0.1},
    "sampled_grad": {"name": "sophia_g"},
    "hvp": {"name": "sophia_h"},
    "per_sample_norms": {"name": "sgd", "lr": 0.1, "dp": {"clip": 1.0}},
}


def task_of(module: nn.Module, x0: Tensor, b: Batch, loss: str = "cross_entropy") -> SupervisedTask:
    """A task whose training samples are those of a batch; its engine is the plain one."""
    inputs, targets = b.inputs.flatten(0, 1), b.targets.flatten(0, 1)
    n = len(targets)
    data = FederatedData(
        inputs=inputs,
        targets=targets,
        offsets=torch.tensor([0, n]),
        order=torch.arange(n),
        test_inputs=inputs[:1],
        test_targets=targets[:1],
        num_classes=zoo.K,
    )
    engine = LoopEngine(module, zoo.Layout.of_module(module), LOSSES[loss])
    return SupervisedTask(data, module, x0, engine, LOSSES[loss])


class Case:
    """A member of the zoo, three clients of it, and a batch whose last client is padded."""

    def __init__(self, name: str, *, dropout: bool = True) -> None:
        module, self.layout, x0 = zoo.model(name, dropout=dropout)
        self.batch = zoo.batch(name, COUNTS)
        self.task = task_of(module.double(), x0, self.batch)
        self.x = zoo.stack(self.layout, x0, len(COUNTS)).clone()
        self.n = self.layout.num_trainable
        self.oracle = self.task.oracle(self.batch, self.x[:, self.n :])

    @property
    def trained(self) -> Tensor:
        return self.x[:, : self.n]

    def gradient(self, trained: Tensor, batch: Batch | None = None) -> Tensor:
        """[3, n] by the plain engine."""
        x = torch.cat([trained, self.x[:, self.n :]], dim=1)
        return self.task.field(x, self.batch if batch is None else batch)[0][:, : self.n]

    def sample_gradient(self, client: int, sample: int) -> Tensor:
        """[n] of one sample alone."""
        b = self.batch
        alone = Batch(b.inputs[client, None, sample, None], b.targets[client, None, sample, None], None, None)
        return self.task.field(self.x[client, None].clone(), alone)[0][0, : self.n]


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_mean_losses_in_evaluation_mode(name: str) -> None:
    case = Case(name)
    points = torch.stack([case.trained, case.trained * 1.01])
    found = case.oracle.losses(points)
    for q in range(2):
        x = torch.cat([points[q], case.x[:, case.n :]], dim=1)
        for i, n in enumerate(COUNTS):
            logits = case.task.engine.logits(x[i], case.batch.inputs[i, :n])
            expected = case.task.sample_loss(logits, case.batch.targets[i, :n]).mean()
            assert torch.allclose(found[q, i], expected, rtol=1e-9)
    assert case.oracle.loss is not None and torch.equal(case.oracle.loss, found.mean(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_hessian_product_is_the_slope_of_the_plain_gradient(name: str) -> None:
    """Dropout, BatchNorm's batch statistics and padding included."""
    case = Case(name)
    v = torch.randn(case.trained.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    far = 1e-6
    slope = (case.gradient(case.trained + far * v) - case.gradient(case.trained - far * v)) / (2 * far)
    found = case.oracle.hvp(case.trained, v)
    assert torch.allclose(found, slope, rtol=1e-5, atol=1e-6 * float(slope.abs().max()))
    assert float(slope.abs().max()) > 1e-3


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet_bn"])
def test_the_sampled_gradient_is_the_gradient_at_labels_drawn_from_the_model(name: str) -> None:
    case = Case(name, dropout=False)
    streams = case.batch.streams
    assert streams is not None
    u = streams.uniform("optimizer labels", *case.batch.targets.shape[1:], step=case.batch.step)
    p = torch.stack([case.task.engine.logits(row, case.batch.inputs[i]) for i, row in enumerate(case.x)]).softmax(-1)
    labels = torch.searchsorted(p.cumsum(-1), u.double().unsqueeze(-1), right=True).squeeze(-1).clamp(max=zoo.K - 1)
    expected = case.gradient(case.trained, replace(case.batch, targets=labels))
    assert torch.allclose(case.oracle.sampled_grad(case.trained), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "resnet_bn"])
def test_the_sampled_gradient_sees_the_training_pass(name: str) -> None:
    """One class leaves nothing to draw: then it is the ordinary gradient, dropout and batch statistics included."""
    case = Case(name)
    sure = case.layout.views(case.x)[case.layout.trainable.names[-1]]
    sure[:, 0] = 1e4
    expected = case.gradient(case.trained, replace(case.batch, targets=torch.zeros_like(case.batch.targets)))
    assert torch.allclose(case.oracle.sampled_grad(case.trained), expected, rtol=1e-9, atol=1e-15)


def test_drawn_labels_follow_the_models_probabilities() -> None:
    case = Case("logistic")
    views = case.layout.views(case.x)
    for name in case.layout.names:
        views[name].zero_()
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -2.0])
    views["1.bias"][:] = logits
    p = logits.double().softmax(0)
    many = 3000
    counts = torch.zeros(zoo.K, dtype=torch.float64)
    for step in range(many // 10):
        b = replace(case.batch, step=step)
        g = case.layout.views(case.task.oracle(b, case.x[:, :0]).sampled_grad(case.x))["1.bias"]
        counts += ((p - g) * torch.tensor(COUNTS)[:, None]).sum(0)  # a bias's gradient is p - share of its class
    frequency = counts / counts.sum()
    assert float(counts.sum()) == pytest.approx(many, rel=1e-9)
    assert bool(((frequency - p).abs() < 4 * (p * (1 - p) / many).sqrt()).all())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet_bn"])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_the_clipped_sum_is_that_of_every_sample_alone(
    name: str, per_tensor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(name, dropout=False)
    num_tensors = len(case.layout.trainable.names)
    bounds = (
        torch.linspace(0.05, 0.5, num_tensors, dtype=torch.float64) if per_tensor else torch.full((1,), 0.7).double()
    )
    expected = torch.zeros_like(case.trained)
    for i, n in enumerate(COUNTS):
        for j in range(n):
            g = case.layout.trainable.views(case.sample_gradient(i, j))
            norms = torch.stack([v.square().sum() for v in g.values()])
            factors = sample_factors(norms[None, None], bounds)[0, 0]
            expected[i] += torch.cat([f * v.flatten() for f, v in zip(factors, g.values(), strict=True)])
    found = case.oracle.clipped_sum(case.trained, bounds)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    for chunk in (samples.CHUNK, 1):
        monkeypatch.setattr(samples, "CHUNK", chunk)
        formed = case.oracle._clipped_by_samples(case.trained, bounds)
        assert torch.allclose(formed, found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet_bn"])
def test_samples_are_clipped_from_what_layers_leave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, bounds = Case(name), torch.full((1,), 0.7).double()
    assert case.oracle._clipped_by_layers(case.trained, bounds) is not None
    monkeypatch.setattr(case.oracle, "_clipped_by_samples", None)
    whole = case.oracle.clipped_sum(case.trained, bounds)
    for i, n in enumerate(COUNTS):  # a stack of one, without padding
        one = case.task.oracle(zoo.rows_of(case.batch, i, n), case.x[i, None, case.n :])
        assert torch.allclose(one.clipped_sum(case.trained[i, None], bounds), whole[i, None], rtol=1e-12, atol=1e-12)


def test_without_a_bound_the_clipped_sum_is_the_gradient_times_the_samples() -> None:
    case = Case("mlp", dropout=False)
    found = case.oracle.clipped_sum(case.trained, torch.tensor([float("inf")], dtype=torch.float64))
    gradient, loss = case.task.field(case.x, case.batch)
    assert torch.allclose(found, gradient * torch.tensor(COUNTS)[:, None], rtol=1e-9, atol=1e-12)
    assert case.oracle.loss is not None and torch.allclose(case.oracle.loss, loss)
    assert case.oracle.batch_sizes().tolist() == case.oracle.num_labels().tolist() == COUNTS


@pytest.mark.parametrize("way", ["_clipped_by_layers", "_clipped_by_samples"])
def test_samples_of_a_batch_drop_out_independently_and_the_same_each_time(way: str) -> None:
    case = Case("mlp")
    twice = replace(case.batch, inputs=case.batch.inputs[:, :1].expand(-1, 2, -1, -1, -1), weights=None)
    twice = replace(twice, targets=case.batch.targets[:, :1].expand(-1, 2))
    both = case.task.oracle(twice, case.x[:, case.n :])
    first = case.task.oracle(replace(twice, weights=torch.tensor([[1.0, 0.0]] * 3)), case.x[:, case.n :])
    no_bound = torch.tensor([float("inf")], dtype=torch.float64)
    a, b = getattr(both, way)(case.trained, no_bound), getattr(first, way)(case.trained, no_bound)
    assert torch.equal(a, getattr(both, way)(case.trained, no_bound))
    assert not torch.allclose(a, 2 * b)


def test_every_position_of_a_sequence_is_a_label() -> None:
    case = Case("transformer")
    assert case.oracle.num_labels().tolist() == [n * zoo.T for n in COUNTS]
    assert case.oracle.batch_sizes().tolist() == COUNTS


@pytest.mark.parametrize("need", RULES)
def test_a_client_is_the_same_alone_and_in_a_stack(need: str) -> None:
    case = Case("mlp")
    v = torch.ones_like(case.trained)
    b = case.batch
    assert b.streams is not None and b.weights is not None

    def ask(s: samples.SamplesOracle, rows: slice) -> Tensor:
        x = case.trained[rows]
        if need == "loss_eval":
            return s.losses(x[None])[0]
        if need == "sampled_grad":
            return s.sampled_grad(x)
        return s.hvp(x, v[rows]) if need == "hvp" else s.clipped_sum(x, x.new_ones(1))

    together = ask(case.oracle, slice(0, 3))
    for i, n in enumerate(COUNTS):
        rows = slice(i, i + 1)
        alone = case.task.oracle(zoo.rows_of(b, i, n), case.x[rows, case.n :])
        assert torch.allclose(ask(alone, rows), together[rows], rtol=1e-9, atol=1e-12)


# Formulas ---------------------------------------------------------------------------------------------------------


def test_a_quadratics_probes_give_its_noisy_field_along_z_and_its_curvature() -> None:
    task = drawn(clients=4, dim=5, noise=0.3)
    rows = torch.tensor([2, 0])
    batch = FormulaBatch(rows, zoo.streams(2), 3)
    made = task.oracle(batch, torch.zeros(2, 0))
    x, z = (torch.randn(2, 5, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    ahead, behind = made.losses(torch.stack([x + z, x - z]))
    field, loss = task.field(x, batch)
    assert torch.allclose((ahead - behind) / 2, (z * field).sum(1))  # exact for a quadratic, however far apart
    assert torch.allclose(made.hvp(x, z), task.a[rows] * z)
    norms = field.norm(dim=1, keepdim=True)
    assert torch.allclose(made.clipped_sum(x, torch.tensor([0.1]).double()), 0.1 * field / norms, rtol=1e-4)
    assert made.loss is not None and torch.equal(made.loss, loss)


def test_a_saddles_curvature_is_the_jacobian_of_its_operator() -> None:
    task = saddle(clients=3, dim=2, lam=0.5)
    batch = FormulaBatch(torch.arange(3), zoo.streams(3), 0)
    made = task.oracle(batch, torch.zeros(3, 0))
    x = torch.zeros(3, 4, dtype=torch.float64)
    columns = torch.stack([made.hvp(x, e.expand(3, 4)) for e in torch.eye(4, dtype=torch.float64)], 2)
    assert torch.allclose(columns[:, :2, 2:], task.matrix) and torch.allclose(columns[:, 2:, :2], -task.matrix.mT)
    assert torch.allclose(columns.diagonal(dim1=1, dim2=2), torch.full((3, 4), 0.5).double())


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet_bn"])
def test_the_zoo_supplies_every_need(name: str) -> None:
    case = Case(name)
    for need, rule in RULES.items():
        optimizer = build(rule, case.layout)
        assert need in optimizer.needs and case.task.lacks(need) is None
        check_needs(optimizer, case.task)


def test_batch_norm_has_no_gradients_of_single_samples() -> None:
    case = Case("resnet_bn")
    with pytest.raises(ValueError, match="'sgd' needs per_sample_norms, but BatchNorm mixes .*take GroupNorm"):
        check_needs(build(RULES["per_sample_norms"], case.layout), case.task)
    check_needs(build(RULES["sampled_grad"], case.layout), case.task)


def test_labels_can_be_drawn_for_cross_entropy_alone() -> None:
    case = Case("mlp")
    task = task_of(case.task.module, case.task.x0, case.batch, "stablemax")
    with pytest.raises(ValueError, match="'sophia_g' needs sampled_grad, but labels can be drawn .* cross_entropy"):
        check_needs(build(RULES["sampled_grad"], case.layout), task)
    check_needs(build(RULES["hvp"], case.layout), task)


def test_a_module_that_cannot_be_batched_is_refused_with_the_reason() -> None:
    module = zoo.Deciding().double()
    layout = zoo.Layout.of_module(module)
    task = task_of(module, torch.zeros(layout.size, dtype=torch.float64), zoo.batch("mlp", COUNTS))
    with pytest.raises(ValueError, match="'mezo' needs loss_eval, but Deciding cannot be batched for it"):
        check_needs(build(RULES["loss_eval"], layout), task)
    check_needs(build({"name": "adam"}, layout), task)


def test_formulas_have_no_labels_and_saddles_no_losses() -> None:
    quadratic, bilinear = drawn(2, 3), saddle(2, 3)
    with pytest.raises(ValueError, match="'sophia_g' needs sampled_grad, but a quadratic has no labels; choose"):
        check_needs(build(RULES["sampled_grad"], quadratic.layout), quadratic)
    with pytest.raises(ValueError, match="'mezo' needs loss_eval, but a saddle point is not minimised"):
        check_needs(build(RULES["loss_eval"], bilinear.layout), bilinear)
    for task in (quadratic, bilinear):
        check_needs(build(RULES["hvp"], task.layout), task)
        check_needs(build(RULES["per_sample_norms"], task.layout), task)


def test_a_task_without_an_oracle_supplies_a_gradient_and_nothing_else() -> None:
    task = drawn(1, 3)
    task.lacks = partial(Task.lacks, task)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="'sophia_h' needs hvp, but this task gives a gradient alone; choose another"):
        check_needs(build(RULES["hvp"], task.layout), task)
    check_needs(build({"name": "lion", "lr": 0.1}, task.layout), task)
