"""The rule for engine and stack width, and the precision of products."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fedsim.engine import Plan, build_engine, choose
from fedsim.engine.choose import MAX_WIDTH_GPU, memory_bytes
from fedsim.engine.precision import products
from fedsim.params import Layout
from fedsim.tasks.models import MODELS, init_parameters
from tests.fedsim.engine.zoo import batch, gradient, model


def plan_of(name: str, shape: tuple[int, ...], **options: object) -> Plan:
    module, _ = init_parameters(partial(MODELS[name], shape, 10), seed=0)
    return choose(module, Layout.of_module(module), batch_size=20, steps=3, **options)  # type: ignore[arg-type]


def test_an_mlp_of_636_kilobytes_gets_stacks_of_six() -> None:
    plan = plan_of("mlp", (1, 28, 28), num_clients=1000)
    assert plan.engine == "stacked" and plan.width == 6
    assert "3.6 MiB" in plan.reason


def test_ten_clients_are_cut_into_two_equal_stacks() -> None:
    plan = plan_of("mlp", (1, 28, 28), num_clients=10)
    assert plan.width == 5 and plan.reason.startswith("10 clients in equal stacks")


@pytest.mark.parametrize("name", ["cnn", "resnet", "resnet_bn"])
def test_on_a_cpu_convolutions_run_one_client_at_a_time(name: str) -> None:
    assert plan_of(name, (1, 28, 28), num_clients=50).width == 1


def test_small_models_and_recurrent_ones_have_bounds() -> None:
    assert plan_of("logistic", (1, 8, 8), num_clients=1000).width == 16
    assert plan_of("char_lstm", (20,), num_clients=1000).width == 4
    assert plan_of("logistic", (1, 8, 8), num_clients=3).width == 3


def test_a_gpu_takes_what_fits_up_to_its_bound() -> None:
    module, _ = init_parameters(partial(MODELS["mlp"], (1, 28, 28), 10), seed=0)
    layout = Layout.of_module(module)
    plan = choose(module, layout, device="cuda", batch_size=20, num_clients=10_000)
    assert plan.width == MAX_WIDTH_GPU and memory_bytes(layout, plan.width, 20) < 4 * 2**30


def test_what_is_set_is_kept() -> None:
    plan = plan_of("cnn", (1, 28, 28), num_clients=50, engine="compiled", stack=7)
    assert (plan.engine, plan.width) == ("compiled", 7)
    assert plan_of("mlp", (1, 28, 28), num_clients=50, engine="loop").width == 1
    with pytest.raises(ValueError, match="stack must be auto or a positive number of clients, got 0"):
        plan_of("mlp", (1, 28, 28), stack=0)


@pytest.mark.parametrize("name", ["loop", "stacked"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "char_lstm", "transformer"])
def test_bf16_products_stay_near_fp32_and_storage_stays_fp32(name: str, kind: str) -> None:
    module, layout, x0 = model(kind)
    x = x0.float().repeat(2, 1)
    b = batch(kind, [4, 2])
    if b.inputs.is_floating_point():
        b = type(b)(b.inputs.float(), b.targets, b.weights, b.streams, b.step)  # type: ignore[union-attr]
    g, loss = gradient(build_engine(name, module, layout), x, b)
    low, low_loss = gradient(build_engine(name, module, layout, precision="bf16"), x, b)
    assert low.dtype == torch.float32 and not torch.equal(low, g)
    assert (low - g).norm() < 0.15 * g.norm() and (low_loss - loss).abs().max() < 0.02


def test_tf32_is_set_inside_and_put_back_after_the_last_user() -> None:
    before = torch.get_float32_matmul_precision()
    context = products("tf32", torch.device("cpu"))
    with context:
        with context:
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
