"""Entries that stay with the client: twins, the two ends (none, all), bits, and which entries there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedsim.aggregate import CenteredClipping
from fedsim.aggregate.coordinatewise import Median
from fedsim.compose import compose
from fedsim.compress.sparsify import TopK
from fedsim.config import ConfigError
from fedsim.optim import build
from fedsim.params import Layout, Split
from fedsim.sim.links import Uplink
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbn import FedBN
from fedsim.strategies.fedper import FedPer
from fedsim.streams import server_rng
from fedsim.tasks.models import cnn, mlp, resnet_bn
from tests.build import Play, digits_task, drawn, local_sgd, play
from tests.reference.personal import fedper, steps
from tests.strategies.personal import OWN, own_models, parted
from tests.strategies.tasks import images

HEAD = ("head",)


def _fedper(task: Any, rate: float = 0.05, num_steps: int = 3, **fields: Any) -> FedPer:
    return FedPer(**{"personal": HEAD, "layout": task.layout, "local": local_sgd(task, rate, steps=num_steps)} | fields)


@pytest.mark.parametrize("size", [None, 2])
def test_equals_its_twin_on_noisy_quadratics(size: int | None) -> None:
    task, twin = parted(3)
    run = Play.start(task, _fedper(task, cohort_size=size), width=2)
    path, models = fedper(twin, task.x0, OWN, 8, eta=0.05, size=size)
    torch.testing.assert_close(run.path(8), path, rtol=0, atol=1e-12)
    torch.testing.assert_close(own_models(run), models, rtol=0, atol=1e-12)


def test_equals_a_plain_loop_of_autograd_on_a_network() -> None:
    task, twin = images(mlp, [7, 20, 1, 0, 13, 9], 5)
    strategy = _fedper(task, 0.2, personal=None, local=local_sgd(task, 0.2, epochs=1, steps=None, batch_size=5))
    own = torch.cat([torch.full((n,), name.startswith("3."), dtype=torch.bool) for name, n in _sizes(task.layout)])
    assert int(own.sum()) == 2010
    run = Play.start(task, strategy, width=4)
    path, models = fedper(twin, task.x0, own, 3, eta=0.2)
    torch.testing.assert_close(run.path(3), path, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(own_models(run), models, rtol=1e-4, atol=2e-5)


def _sizes(layout: Layout) -> list[tuple[str, int]]:
    return list(zip(layout.names, layout.sizes, strict=True))


@pytest.mark.parametrize("fields", [{}, {"aggregator": Median()}, {"server_lr": 0.5}])
def test_without_entries_of_their_own_it_is_fedavg(fields: dict[str, Any]) -> None:
    task, _ = parted(3)
    ours = play(task, _fedper(task, cohort_size=3, personal=(), **fields), 6)
    theirs = play(task, FedAvg(cohort_size=3, local=local_sgd(task, 0.05, steps=3), **fields), 6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_with_all_entries_their_own_everybody_trains_alone_and_nothing_is_sent() -> None:
    task, twin = parted(3)
    run = Play.start(task, _fedper(task, cohort_size=2, personal=("*",)))
    assert torch.equal(run.path(6), task.x0.expand(6, -1))
    assert (run.fleet.ledger.bits_up, run.fleet.ledger.bits_down) == (0, 0)
    alone = []
    for i in range(twin.n):
        y = task.x0
        for job in range(int(run.fleet.job_counts[i])):
            y = steps(twin, i, y, job, 0.05)
        alone.append(y)
    torch.testing.assert_close(own_models(run), torch.stack(alone), rtol=0, atol=1e-12)


def test_own_entries_cost_no_bits_whole_or_compressed() -> None:
    task, _ = parted(1)
    for uplink, bits in ((None, 2 * 32), (Uplink(compressor=TopK(k=1).bind(Layout.of({"x": (2,)}))), None)):
        run = Play.start(task, _fedper(task), uplink=uplink)
        run.step()
        expected = bits or uplink.compressor.bits(2)  # type: ignore[union-attr]
        assert (run.fleet.ledger.bits_up, run.fleet.ledger.bits_down) == (5 * expected, 5 * 2 * 32)


def test_links_and_clocks_count_what_is_sent() -> None:
    config = _config(personal=["1.bias"]) | {"data": {"client_test": 0.2}}
    config["uplink"] = {"compressor": {"name": "rand_k", "k": 640}}  # all of what is sent
    config["clients"] |= {"devices": {"name": "constant", "seconds_per_step": 0.0, "uplink": 64.0}}
    composition = compose(config, "config")
    fleet, strategy = composition.experiment.fleet, composition.experiment.strategy
    strategy.round(strategy.init(composition.experiment.task.init(0)), fleet, server_rng(0, "server"))
    composition.close()
    bits = composition.executor.runner.uplink.compressor.bits(640)  # type: ignore[attr-defined]
    assert fleet.ledger.bits_up == 4 * bits and fleet.now == pytest.approx(bits / 64)
    assert "650 parameters, of which 10 stay with the client" in composition.plan["model"]


def test_a_server_optimizer_and_a_rule_that_begins_at_the_last_step_see_vectors_that_fit() -> None:
    task, _ = parted(2)
    rule = build({"name": "adam", "lr": 0.1}, task.layout)
    x = play(task, _fedper(task, server_optimizer=rule), 4)
    assert torch.equal(x[:, 1], task.x0[1].expand(4)) and float((x[-1] - task.x0)[::2].abs().min()) > 0.01
    decaying = build({"name": "adamw", "lr": 0.1, "weight_decay": 0.5, "decay_vectors": True}, task.layout)
    assert torch.equal(play(task, _fedper(task, server_optimizer=decaying), 4)[:, 1], task.x0[1].expand(4))
    clipped = play(task, _fedper(task, aggregator=CenteredClipping(tau=1e-3)), 4)
    assert torch.equal(clipped[:, 1], task.x0[1].expand(4)) and not torch.equal(clipped[-1], clipped[-2])


def _config(**fields: Any) -> dict[str, Any]:
    return {
        "task": {"name": "classification", "dataset": "digits", "model": "logistic"},
        "clients": {"count": 4},
        "strategy": {"name": "fedper", **fields},
        "local": {"steps": 1},
    }


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"personal": ["1.*", "head.*"]},
            r"strategy: personal: 'head\.\*' of \['1\.\*', 'head\.\*'\] matches no .* are 1\.weight, 1\.bias",
        ),
        ({}, "strategy: personal: no last layer beside others trains here"),
        ({"name": "fedbn"}, "strategy: personal: this model has no normalisation layer"),
        ({"layout": 3}, "strategy.layout: is not set here"),
        ({"personal": "head"}, "strategy.personal: expected"),
    ],
)
def test_entries_that_are_not_there_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(_config(**fields), "config")


def test_the_last_layer_and_normalisation_layers_are_found() -> None:
    assert Layout.of_module(cnn((1, 8, 8), 10)).last_layer == ("9.weight", "9.bias")
    assert drawn(2, 3).layout.last_layer == ()
    loose = nn.ParameterDict({"w": torch.zeros(4, 3), "b": torch.zeros(4), "v": torch.zeros(2, 4)})
    assert Layout.of_module(loose).last_layer == ()  # no layer is apart from the rest
    task = digits_task(lambda shape, classes: resnet_bn(shape, classes, width=2, stages=2), [4, 4])
    strategy = FedBN(layout=task.layout, local=local_sgd(task, 0.1, steps=1, batch_size=4))
    norms = {k for k, m in task.module.named_modules() if isinstance(m, nn.BatchNorm2d)}
    own = {f"{k}.{part}" for k in norms for part in ("weight", "bias")}
    own |= {f"{k}.{part}" for k in norms for part in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(strategy.split.names) == own and len(norms) == 6


def test_running_statistics_of_fedbn_are_those_of_the_clients_own_data() -> None:
    task = digits_task(lambda shape, classes: resnet_bn(shape, classes, width=2, stages=1), [6, 6])
    strategy = FedBN(layout=task.layout, local=local_sgd(task, 0.1, steps=1, batch_size=None))
    run = Play.start(task, strategy)
    x = run.path(1)[0]
    models, first = task.layout.views(own_models(run)), "stem.1.running_mean"
    assert torch.equal(task.layout.views(x)[first], task.layout.views(task.x0)[first])
    weight = task.layout.views(task.x0)["stem.0.weight"]
    for i in range(2):
        inputs = task.data.inputs[task.data.order[6 * i : 6 * i + 6]]
        seen = nn.functional.conv2d(inputs, weight, padding=1).mean((0, 2, 3))
        torch.testing.assert_close(models[first][i], 0.1 * seen, rtol=1e-4, atol=1e-6)


def test_a_split_takes_apart_and_joins_with_leading_axes() -> None:
    layout = Layout.of({"a": (2,), "b": (2, 2), "c": (1,), "d": (3,)})
    split, v = Split.matching(layout, ["b", "[d]"]), torch.arange(20.0).view(2, 10)
    assert split.names == ("b", "d") and split.shared_layout.names == ("a", "c")
    assert split.shared(v)[0].tolist() == [0, 1, 6] and split.own(v)[1].tolist() == [12, 13, 14, 15, 17, 18, 19]
    assert torch.equal(split.joined(split.shared(v), split.own(v)), v)
    assert split.joined(split.shared(v[0]), split.own(v)).tolist()[1][:3] == [0, 1, 12]
