"""The model zoo: sizes, keyed initial parameters, options and their checks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fedsim.params import Layout
from fedsim.tasks.models import MODELS, init_parameters

SEQUENCES = ("char_lstm", "transformer")


def num_trainable(name: str, shape: tuple[int, ...], classes: int, **options: object) -> int:
    module, _ = init_parameters(partial(MODELS[name], shape, classes, **options), seed=0)
    return Layout.of_module(module).num_trainable


def test_published_parameter_counts() -> None:
    assert num_trainable("cnn", (1, 28, 28), 10) == 1_663_370
    assert num_trainable("mlp", (1, 28, 28), 10) == 159_010
    assert num_trainable("mlp", (1, 28, 28), 10, hidden=[200, 200]) == 199_210
    assert num_trainable("logistic", (1, 28, 28), 10) == 7_850
    # embedding 90 x 8, gates 4 x 256 of (8 + 256 + 2) and (256 + 256 + 2), head 256 x 90 + 90
    assert num_trainable("char_lstm", (80,), 90) == 720 + 1024 * 266 + 1024 * 514 + 23_130


@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_a_logit_per_class(name: str) -> None:
    shape = (6,) if name in SEQUENCES else (3, 9, 8)
    module, flat = init_parameters(partial(MODELS[name], shape, 5), seed=0)
    inputs = torch.zeros(2, *shape, dtype=torch.int64 if name in SEQUENCES else torch.float32)
    out = module(inputs)
    assert out.shape == ((2, 6, 5) if name in SEQUENCES else (2, 5))
    assert flat.shape == (Layout.of_module(module).size,) and bool(flat.isfinite().all())


def test_initial_parameters_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    factory = partial(MODELS["mlp"], (1, 8, 8), 10)
    before = torch.get_rng_state()
    _, a = init_parameters(factory, seed=1)
    torch.rand(3)
    _, b = init_parameters(factory, seed=1)
    _, c = init_parameters(factory, seed=2)
    torch.set_rng_state(before)
    assert torch.equal(a, b) and not torch.equal(a, c)
    init_parameters(factory, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_flat_parameters_are_the_modules_own_with_buffers_last() -> None:
    module, flat = init_parameters(partial(MODELS["resnet_bn"], (1, 8, 8), 10), seed=0)
    layout = Layout.of_module(module)
    views = layout.views(flat)
    assert torch.equal(views["head.weight"], module.head.weight)  # type: ignore[union-attr, arg-type]
    assert layout.names[-1].endswith("num_batches_tracked") and layout.num_buffers > 0
    assert not MODELS["resnet"]((1, 8, 8), 10).state_dict().keys() - set(
        Layout.of_module(MODELS["resnet"]((1, 8, 8), 10)).names
    )


def test_a_position_of_the_transformer_does_not_see_later_ones() -> None:
    module, _ = init_parameters(partial(MODELS["transformer"], (6,), 9), seed=0)
    a = torch.tensor([[1, 2, 3, 4, 5, 6]])
    b = torch.tensor([[1, 2, 3, 8, 8, 8]])
    out_a, out_b = module.eval()(a), module(b)
    assert torch.allclose(out_a[:, :3], out_b[:, :3], atol=1e-6)
    assert not torch.allclose(out_a[:, 3:], out_b[:, 3:], atol=1e-3)


def test_resnet_18_is_the_published_network_behind_a_stem_for_small_images() -> None:
    found = MODELS["resnet_bn"]((3, 32, 32), 10, width=64, blocks=2, stages=4)
    sizes = [p.numel() for p in found.parameters()]
    stem = 3 * 64 * (7 * 7 - 3 * 3)  # He et al. begin with a 7x7 convolution
    assert sum(sizes) == 11_689_512 - stem - 513 * 1000 + 513 * 10 and len(sizes) == 62


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("mlp", (4,), {"hidden": [0]}, "mlp.hidden must list positive widths"),
        ("mlp", (4,), {"dropout": 1.0}, "mlp.dropout must be at least 0 and less than 1, got 1.0"),
        ("cnn", (64,), {}, "model cnn reads images"),
        ("resnet", (1, 8, 8), {"width": 12}, "resnet.width must be a multiple of 8"),
        ("resnet_bn", (1, 8, 8), {"blocks": 0}, "resnet.blocks and .* must be at least 1, got 0 and 3"),
        ("char_lstm", (1, 8, 8), {}, "model char_lstm reads sequences"),
        ("transformer", (5,), {"width": 10, "heads": 4}, "transformer.width=10 must be a multiple of heads=4"),
    ],
)
def test_bad_options_are_named(name: str, shape: tuple[int, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS[name](shape, 10, **options)
