"""The rule for engine and stack width, and the precision of products."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fedsim.engine import Plan, build_engine, choose_engine
from fedsim.engine.choose import MAX_WIDTH_GPU, enough_stacks, memory_bytes
from fedsim.engine.precision import products
from fedsim.params import Layout
from fedsim.tasks.models import MODELS, init_parameters
from tests.fedsim.engine.zoo import Deciding, batch, gradient, model


def plan_of(name: str, shape: tuple[int, ...], **options: object) -> Plan:
    module, _ = init_parameters(partial(MODELS[name], shape, 10), seed=0)
    return choose_engine(module, Layout.of_module(module), batch_size=20, steps=3, **options)  # type: ignore[arg-type]


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
    plan = plan_of("char_lstm", (20,), num_clients=1000)
    assert (plan.engine, plan.width) == ("loop", 1) and "one call for a recurrent layer" in plan.reason
    assert plan_of("char_lstm", (20,), num_clients=1000, device="cuda").engine == "stacked"
    assert plan_of("logistic", (1, 8, 8), num_clients=3).width == 3


def test_a_patch_convolution_is_a_linear_layer() -> None:
    for stride, width in ((4, 16), (2, 1)):
        module = nn.Sequential(nn.Conv2d(1, 8, 4, stride), nn.Flatten(), nn.LazyLinear(10))
        module(torch.zeros(1, 1, 8, 8))
        assert choose_engine(module, Layout.of_module(module), num_clients=1000).width == width


def test_stacks_are_wide_where_products_have_many_rows() -> None:
    module, sample = MODELS["transformer"]((20,), 10, width=128), torch.zeros(20, dtype=torch.int64)
    layout = Layout.of_module(module)
    few, many = (choose_engine(module, layout, num_clients=1000, sample=sample, batch_size=size) for size in (1, 20))
    assert (few.width, many.width) == (2, 8) and "many rows" in many.reason
    mlp = MODELS["mlp"]((1, 28, 28), 10, hidden=[512])
    assert choose_engine(mlp, Layout.of_module(mlp), num_clients=1000, sample=torch.zeros(1, 28, 28)).width == 2


@pytest.mark.parametrize("hidden, width", [(9000, 1), (8, 16)])
def test_modules_without_a_tape_run_one_client_at_a_time_if_large_and_the_plan_says_so(hidden: int, width: int) -> None:
    module = Deciding()
    module.fc = nn.Sequential(nn.Linear(64, hidden), nn.Linear(hidden, 7))
    plan = choose_engine(module, Layout.of_module(module), num_clients=1000, sample=torch.zeros(1, 8, 8))
    assert plan.width == width and "without a tape (the module looks at its data (__float__))" in plan.reason


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_lower_precision_leaves_runs_in_factors_on_a_cpu_as_they_are(precision: str) -> None:
    options: dict[str, object] = {"num_clients": 1000, "plain": True}
    fp32, low = (plan_of("mlp", (1, 28, 28), precision=p, **options) for p in ("fp32", precision))
    assert low.width == fp32.width and f"faster here than {precision} steps" in low.reason
    module, layout, _ = model("logistic")
    assert build_engine("stacked", module, layout, precision=precision).chain is not None
    assert "seldom faster" in plan_of("cnn", (1, 28, 28), precision="bf16").reason


def test_a_gpu_takes_what_fits_up_to_its_bound() -> None:
    module, _ = init_parameters(partial(MODELS["mlp"], (1, 28, 28), 10), seed=0)
    layout = Layout.of_module(module)
    plan = choose_engine(module, layout, device="cuda", batch_size=20, num_clients=10_000)
    assert plan.width == MAX_WIDTH_GPU and memory_bytes(layout, plan.width, 20) < 4 * 2**30


@pytest.mark.parametrize(
    ("num_clients", "width", "workers", "stacks"),
    [
        (100, 25, 1, 1),  # what `choose` gave is even, which serves one worker and two
        (100, 25, 2, 1),
        (100, 25, 3, 6),  # 4 stacks would leave two workers idle half the time
        (100, 25, 8, 8),
        (10, 5, 64, 10),  # more than clients there cannot be
        (100, 6, 4, 1),  # 17 stacks are more than four for each
        (100, 6, 5, 20),
        (100, 1, 8, 1),
        (3, 8, 4, 3),
    ],
)
def test_a_cohort_is_cut_into_as_many_stacks_as_workers_need(
    num_clients: int, width: int, workers: int, stacks: int
) -> None:
    layout = Layout.of({"w": (784, 200)})
    assert enough_stacks(num_clients, width, workers, layout, "cpu") == stacks


def test_small_models_are_not_cut_for_more_cores_but_for_more_gpus() -> None:
    layout = Layout.of({"w": (8, 2048)})  # 64 KiB, so that a stack of 8 is the narrowest on a CPU
    assert [enough_stacks(n, 16, 8, layout, "cpu") for n in (7, 16, 40, 64, 1000)] == [1, 2, 5, 8, 1]
    tiny = Layout.of({"w": (2,)})
    assert enough_stacks(100, 16, 8, tiny, "cpu") == 1
    assert [enough_stacks(500, 500, workers, tiny, "cuda") for workers in (1, 2, 8)] == [1, 2, 8]


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
    try:
        low, low_loss = gradient(build_engine(name, module, layout, precision="bf16"), x, b)
    except RuntimeError as error:
        if "primitive descriptor for the LSTM" not in str(error):
            raise
        pytest.skip("this CPU has no LSTM in bfloat16")
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
