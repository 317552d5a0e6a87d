"""Local rules that need more than a gradient, run from an experiment file, against one client after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fedsim
from fedsim import runs
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.streams import Streams
from tests.reference.clients import Modules, cohort, stream

ROUNDS, SIZE, BATCH = 3, 4, 60
CONFIG: dict[str, Any] = {
    "rounds": ROUNDS,
    "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [8]}},
    "partition": {"name": "dirichlet", "alpha": 1.0},
    "clients": {"count": 7},
    "strategy": {"name": "fedavg", "cohort_size": SIZE},
    "local": {"epochs": 1, "batch_size": BATCH},
    "evaluate": {"every": ROUNDS, "per_client": False},
}


class Twin(Modules):
    """A client's minibatch as losses of its samples at a flat x [P]."""

    def batch(self, i: int, job: int, step: int) -> tuple[Tensor, Tensor]:
        order = stream(self.seed, i, job).permutation("batches", torch.tensor([self.samples(i)]))[0]
        rows = order[step * BATCH : (step + 1) * BATCH]
        return self.inputs[i][rows], self.targets[i][rows]

    def losses(self, x: Tensor, batch: tuple[Tensor, Tensor], logits_too: bool = False) -> Any:
        w1, b1, w2, b2 = self.tensors(x)
        logits = (batch[0].flatten(1) @ w1.T + b1).relu() @ w2.T + b2
        losses = -logits.log_softmax(1)[torch.arange(len(logits)), batch[1]]
        return (losses, logits) if logits_too else losses

    def tensors(self, x: Tensor) -> list[Tensor]:
        at, out = 0, []
        for p in self.module.parameters():
            out.append(x[at : at + p.numel()].view(p.shape))
            at += p.numel()
        return out


def slope(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


class Rule:
    """One client's optimizer: `memory` is its state, `t` counts its steps."""

    def __init__(self, size: int) -> None:
        self.t = 0
        self.m, self.h = torch.zeros(size), torch.zeros(size)

    def step(self, twin: Twin, y: Tensor, batch: tuple[Tensor, Tensor], keys: Streams, step: int) -> Tensor:
        raise NotImplementedError


class Mezo(Rule):
    SPEC = {"name": "mezo", "lr": 0.01, "zeroth_order": {"eps": 0.05, "directions": 2}}

    def step(self, twin: Twin, y: Tensor, batch: tuple[Tensor, Tensor], keys: Streams, step: int) -> Tensor:
        g = torch.zeros_like(y)
        for i in range(2):
            z = keys.normal(f"optimizer direction {i}", len(y), step=self.t)[0]
            ahead, behind = (twin.losses(y + e * z, batch).mean() for e in (0.05, -0.05))
            g += (ahead - behind) / 0.1 * z / 2
        return y - 0.01 * g


class Private(Rule):
    SPEC = {"name": "sgd", "lr": 0.2, "dp": {"clip": 0.8, "noise": 0.5}}

    def step(self, twin: Twin, y: Tensor, batch: tuple[Tensor, Tensor], keys: Streams, step: int) -> Tensor:
        total = 0.8 * 0.5 * keys.normal("optimizer dp", len(y), step=self.t)[0]
        for image, label in zip(*batch, strict=True):
            g = slope(lambda x: twin.losses(x, (image[None], label[None])).sum(), y)  # noqa: B023
            total += g * min(1.0, 0.8 / (float(g.norm()) + 1e-6))
        return y - 0.2 * total / len(batch[0])


class Sophia(Rule):
    """Decays the matrices alone by 0.1 * lr before the step."""

    RHO, LR = 0.04, 0.003

    def curvature(self, twin: Twin, y: Tensor, batch: tuple[Tensor, Tensor], keys: Streams, step: int) -> Tensor:
        raise NotImplementedError

    def shrunk(self, twin: Twin, y: Tensor) -> Tensor:
        y = y.clone()
        for p in twin.tensors(y):
            if p.ndim == 2:
                p *= 1 - 0.1 * self.LR
        return y


class SophiaG(Sophia):
    SPEC = {"name": "sophia_g", "lr": 0.003, "every": 2}

    def step(self, twin: Twin, y: Tensor, batch: tuple[Tensor, Tensor], keys: Streams, step: int) -> Tensor:
        self.m = 0.965 * self.m + 0.035 * slope(lambda x: twin.losses(x, batch).mean(), y)
        if self.t % 2 == 1:
            _, logits = twin.losses(y, batch, logits_too=True)
            u = keys.uniform("optimizer labels", len(batch[0]), step=step)[0]
            labels = torch.searchsorted(logits.softmax(1).cumsum(1), u[:, None], right=True)[:, 0].clamp(max=9)
            g = slope(lambda x: twin.losses(x, (batch[0], labels)).mean(), y)
            self.h = 0.99 * self.h + 0.01 * len(labels) * g * g
        u = self.m.sign() * (self.m.abs() / (0.04 * self.h + 1e-15)).clamp(max=1.0)
        return self.shrunk(twin, y) - 0.003 * u


class SophiaH(Sophia):
    SPEC = {"name": "sophia_h", "lr": 0.3, "every": 2}
    LR = 0.3

    def step(self, twin: Twin, y: Tensor, batch: tuple[Tensor, Tensor], keys: Streams, step: int) -> Tensor:
        def mean(x: Tensor) -> Tensor:
            return twin.losses(x, batch).mean()

        self.m = 0.965 * self.m + 0.035 * slope(mean, y)
        if self.t % 2 == 1:
            z = keys.rademacher("optimizer hvp", len(y), step=self.t)[0]
            x = y.clone().requires_grad_()
            (first,) = torch.autograd.grad(mean(x), x, create_graph=True)
            self.h = 0.99 * self.h + 0.01 * z * torch.autograd.grad((first * z).sum(), x)[0]
        return self.shrunk(twin, y) - 0.3 * (self.m / self.h.clamp(min=1e-12)).clamp(-0.01, 0.01)


def fedavg_twin(twin: Twin, x: Tensor, rule: type[Rule], scope: str) -> Tensor:
    """x after the rounds; with scope `client` a client's rule lives on between its rounds."""
    jobs = [0] * twin.n
    kept: dict[int, Rule] = {}
    for r in range(ROUNDS):
        chosen = cohort(r, twin.n, SIZE)
        total = sum(twin.samples(i) for i in chosen)
        new = torch.zeros_like(x)
        for i in chosen:
            own = kept.setdefault(i, rule(len(x))) if scope == "client" else rule(len(x))
            y = x
            for step in range(twin.steps(i)):
                own.t += 1
                y = own.step(twin, y, twin.batch(i, jobs[i], step), stream(0, i, jobs[i]), step)
            jobs[i] += 1
            new += twin.samples(i) / total * y
        x = new
    return x


def config(rule: type[Rule], scope: str) -> dict[str, Any]:
    return {**CONFIG, "local": {**CONFIG["local"], "optimizer": {**rule.SPEC, "state_scope": scope}}}  # type: ignore[attr-defined]


@pytest.mark.parametrize("scope", ["round", "client"])
@pytest.mark.parametrize("rule", [Mezo, Private, SophiaG, SophiaH])
def test_a_run_from_a_file_equals_its_plain_twin(rule: type[Rule], scope: str, tmp_path: Path) -> None:
    raw = config(rule, scope)
    history = fedsim.run(raw, out=tmp_path / "run", **{"runtime.stack": 3})
    composition = compose(raw, "x.yaml")
    composition.close()
    assert composition.samples is not None
    data, module = composition.samples.data, composition.samples.module
    rows = data.order.split(data.num_examples.tolist())
    twin = Twin(module, [data.inputs[r] for r in rows], [data.targets[r] for r in rows], BATCH)
    x0 = composition.experiment.task.init(0)
    assert len({twin.steps(i) for i in range(twin.n)}) > 1, "some clients are to stop before others"
    expected = fedavg_twin(twin, x0, rule, scope)
    state = load_file(tmp_path / "run" / "model.safetensors")
    found = torch.cat([state[name].flatten() for name, _ in module.named_parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float((expected - x0).abs().max()) > 1e-3
    assert 0 < history.last("train_loss") < 10


@pytest.mark.parametrize("rule", [Mezo, SophiaG])
def test_rows_kept_by_clients_survive_a_stop(rule: type[Rule], tmp_path: Path) -> None:
    raw = config(rule, "client")
    fedsim.run(raw, out=tmp_path / "whole")
    fedsim.run(raw, out=tmp_path / "parts", rounds=1)
    fedsim.run(raw, out=tmp_path / "parts", resume=True)
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_state_that_clients_keep_is_not_the_state_of_a_round() -> None:
    losses = [fedsim.run(config(SophiaG, scope)).series("train_loss")[1].tolist() for scope in ("round", "client")]
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]


def test_zeroth_order_steps_learn() -> None:
    raw = config(Mezo, "round")
    raw["local"] |= {"epochs": 2, "optimizer": {"name": "mezo", "lr": 0.02, "zeroth_order": {"directions": 8}}}
    history = fedsim.run(raw, rounds=20)
    losses = history.series("train_loss")[1]
    assert losses[-1] < 0.9 * losses[0]


# Refusals ---------------------------------------------------------------------------------------------------------


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(*runs.load(raw, {}))
    return str(caught.value)


def test_a_rule_that_the_task_cannot_feed_is_refused_before_the_run() -> None:
    raw = {"task": {"name": "quadratic", "dim": 3}, "local": {"optimizer": {"name": "sophia_g"}}}
    assert "local.optimizer: optimizer 'sophia_g' needs sampled_grad, but a quadratic has no labels" in refusal(raw)
    raw = {"task": {"name": "bilinear", "dim": 3, "lam": 1.0}, "local": {"optimizer": {"name": "mezo", "lr": 0.1}}}
    assert "local.optimizer: optimizer 'mezo' needs loss_eval, but a saddle point is not minimised" in refusal(raw)


def test_a_module_with_batch_norm_is_not_trained_in_private() -> None:
    raw = {
        "task": {"name": "classification", "dataset": "digits", "model": {"name": "resnet_bn", "width": 4}},
        "local": {"optimizer": {"name": "sgd", "lr": 0.1, "dp": {"clip": 1.0}}},
    }
    assert "BatchNorm mixes the samples of a batch" in refusal(raw)


@pytest.mark.parametrize("rule", [{"name": "sophia_g"}, {"name": "mezo", "lr": 1.0}])
def test_a_server_has_a_gradient_and_nothing_else(rule: dict[str, Any]) -> None:
    raw = {**CONFIG, "strategy": {"name": "fedavg", "server_optimizer": rule}}
    assert f"strategy.server_optimizer: {rule['name']} needs" in refusal(raw)


@pytest.mark.parametrize("strategy", ["scaffold", "fedavg_m", "scaffold_m", "fedavg_m_vr", "scaffold_m_vr", "fedcm"])
def test_a_private_gradient_is_not_mixed_with_raw_ones(strategy: str) -> None:
    raw = {**config(Private, "round"), "strategy": {"name": strategy}}
    assert "{name: sgd} without momentum" in refusal(raw)
