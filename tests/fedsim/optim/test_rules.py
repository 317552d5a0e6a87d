"""Closed forms, limits and hazards of rules that no installed library implements."""

import math

import pytest
import torch
from torch import Tensor

from fedsim.optim import build
from fedsim.params import Layout
from fedsim.streams import Streams
from tests.fedsim.optim.oracles import LAYOUT, problem, stack_run

ONE = Layout.of({"w": (1, 1)})


def gap(a: dict, b: dict, steps: int = 7) -> float:
    """Largest difference of two optimizers on the same problem."""
    x, grads = problem(steps)
    return float((stack_run(a, x, grads) - stack_run(b, x, grads)).abs().max())


def scalar(spec: dict, x: float, grads: list[float]) -> float:
    return float(stack_run(spec, torch.tensor([[x]]).double(), torch.tensor(grads).double().view(-1, 1, 1), ONE))


@pytest.mark.parametrize(
    "a, b",
    [
        ({"name": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": True}, {"name": "sgd", "lr": 0.1}),
        ({"name": "adam", "lr": 0.1, "beta1": 0, "beta2": 0, "eps": 0}, {"name": "signsgd", "lr": 0.1}),
        (
            {"name": "adan", "lr": 0.1, "beta2": 0},
            {"name": "adam", "lr": 0.1, "beta1": 0.98, "beta2": 0.99},
        ),
        ({"name": "lion", "lr": 0.1, "beta1": 0.9, "beta2": 0.9}, {"name": "signum", "lr": 0.1, "momentum": 0.9}),
        ({"name": "lion_k", "lr": 0.1}, {"name": "lion", "lr": 0.1}),
        (
            {"name": "lion_k", "kappa": "identity", "lr": 0.1, "beta1": 0.9, "beta2": 0.9},
            {"name": "sgd", "lr": 0.1, "momentum": 0.9, "ema": True},
        ),
        ({"name": "lion_k", "kappa": "dead_zone", "e": 1e-9, "lr": 0.1}, {"name": "lion", "lr": 0.1}),
        ({"name": "lion_k", "kappa": "huber", "e": 1e-9, "lr": 0.1}, {"name": "lion", "lr": 0.1}),
        ({"name": "lion_k", "kappa": "top_k", "fraction": 1.0, "lr": 0.1}, {"name": "lion", "lr": 0.1}),
        (
            {"name": "lion_k", "kappa": "lp", "p": 2.0, "lr": 0.1},
            {"name": "lion_k", "kappa": "group", "lr": 0.1},
        ),
        ({"name": "spam", "lr": 0.1, "threshold": 0, "interval": 10**6}, {"name": "adamw_hf", "lr": 0.1}),
        ({"name": "adamp", "lr": 0.1, "delta": 0.0}, {"name": "adamw", "lr": 0.1, "weight_decay": 0}),
        ({"name": "sgdp", "lr": 0.1, "delta": 0.0}, {"name": "sgd", "lr": 0.1}),
        ({"name": "schedule_free_sgd", "lr": 0.1, "beta": 0.0}, {"name": "sgd", "lr": 0.1}),
        (
            {"name": "sgd", "lr": 0.1, "clip": {"adaptive": 1e9, "tensor": 1e9, "global": 1e9, "value": 1e9}},
            {"name": "sgd", "lr": 0.1},
        ),
    ],
)
def test_a_rule_meets_its_limit(a: dict, b: dict) -> None:
    assert gap(a, b) < 1e-8


def test_adan_restarted_is_its_first_step_again() -> None:
    assert scalar({"name": "adan", "lr": 0.5}, 1.0, [3.0]) == pytest.approx(0.5)  # m/bc1 = g and n/bc3 = g^2


def test_diffgrad_halves_adam_on_a_steady_gradient() -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    grads = torch.full((5, 1, 1), 0.7, dtype=torch.float64)
    path = [float(stack_run({"name": "diffgrad", "lr": 0.1}, x, grads[:n], ONE)) for n in range(1, 6)]
    assert [a - b for a, b in zip(path, path[1:], strict=False)] == pytest.approx([0.05] * 4, abs=1e-7)


def test_diffgrad_remembers_the_gradient_and_not_an_alias_of_it() -> None:
    jump = scalar({"name": "diffgrad", "lr": 0.1}, 0.0, [0.0, 50.0]) - scalar(
        {"name": "diffgrad", "lr": 0.1}, 0.0, [0.0]
    )
    adam = scalar({"name": "adam", "lr": 0.1}, 0.0, [0.0, 50.0])
    assert jump == pytest.approx(adam, rel=1e-6)  # friction 1, not the 1/2 of an alias


def test_adabelief_first_state_is_as_derived() -> None:
    x, g, eps = torch.zeros(1, 1).double(), torch.full((1, 1), 2.0).double(), 1e-3
    optimizer = build({"name": "adabelief", "lr": 0.1, "eps": eps}, ONE)
    state = optimizer.init(x)
    optimizer.step_(x, g, state)
    assert float(state.buffers["v"]) == pytest.approx(0.001 * 0.9**2 * 4 + eps)


def test_lion_contracts_to_the_box_of_its_decay() -> None:
    x, grads = problem(steps=1)
    x = 10 * x
    spec = {"name": "lion", "lr": 0.05, "weight_decay": 2.0, "decay_vectors": True}
    optimizer = build(spec, LAYOUT)
    state = optimizer.init(x)
    for i in range(20):
        before = x.abs().amax(1) - 0.5
        optimizer.step_(x, torch.sin(grads[0] * (i + 1)), state)
        assert (x.abs().amax(1) - 0.5 <= (1 - 0.1) * before + 1e-13).all()


def test_spam_after_a_reset_takes_the_damped_step_that_its_global_counter_gives() -> None:
    spec = {"name": "spam", "lr": 0.1, "interval": 3, "warmup": 150, "guard": 2}
    moved = scalar(spec, 0.0, [1.0, -2.0, 5.0]) - scalar(spec, 0.0, [1.0, -2.0])
    bc1, bc2 = 1 - 0.9**3, 1 - 0.999**3
    m, v = 0.1 * 5, 0.001 * 25
    assert moved == pytest.approx(-0.1 * 0.01 * math.sqrt(bc2) / bc1 * m / (math.sqrt(v) + 1e-6))


@pytest.mark.parametrize("spike", [1000.0, -1000.0])
def test_spam_cuts_a_spike_to_the_root_of_its_threshold(spike: float) -> None:
    spec = {
        "name": "spam",
        "lr": 0.1,
        "threshold": 9.0,
        "interval": 10**6,
        "guard": 2,
        "beta1": 0.0,
        "beta2": 0.5,
        "eps": 0,
    }
    x, optimizer = torch.zeros(1, 1).double(), build(spec, ONE)
    state = optimizer.init(x)
    for g in (2.0, spike):
        optimizer.step_(x, torch.tensor([[g]]).double(), state)
    assert float(state.buffers["m"]) == pytest.approx(math.copysign(3 * math.sqrt(2.0), spike))


def test_sparse_spam_moves_and_decays_by_its_mask_and_vectors_densely() -> None:
    x, grads = problem(steps=5)
    optimizer = build({"name": "spam_sparse", "lr": 0.1, "density": 0.5, "interval": 50}, LAYOUT)
    y, ids = x.clone(), torch.arange(3)
    state = optimizer.init(y)
    for g in grads:
        optimizer.step_(y, g, state, streams=Streams(0, ids, ids))
    on = state.buffers["on"].bool()
    assert torch.equal(y == x, ~on)
    views = LAYOUT.views(on)
    assert views["b"].all() and 0.3 < views["w"].double().mean() < 0.7
    assert not torch.equal(views["w"][0], views["w"][1])
    assert not state.buffers["m"][~on].any()


def test_yogi_moves_v_by_the_square_and_not_by_the_gap() -> None:
    x, optimizer = torch.zeros(1, 1).double(), build({"name": "yogi", "init": 1.0}, ONE)
    state = optimizer.init(x)
    optimizer.step_(x, torch.tensor([[0.5]]).double(), state)
    assert float(state.buffers["v"]) == pytest.approx(1.0 - 0.001 * 0.25)


def test_optimistic_descent_converges_on_a_bilinear_game_where_descent_spirals_out() -> None:
    layout = Layout.of({"x": (1,), "y": (1,)})
    size = {}
    for name in ("optimistic", "sgd"):
        z = torch.tensor([[1.0, 1.0]])
        optimizer = build({"name": name, "lr": 0.2}, layout)
        state = optimizer.init(z)
        for _ in range(300):
            optimizer.step_(z, torch.stack([z[:, 1], -z[:, 0]], 1), state)
        size[name] = float(z.norm())
    assert size["optimistic"] < 1e-2 and size["sgd"] > 10


def test_exponentiated_gradient_keeps_signs_and_zeros() -> None:
    x, grads = problem()
    x[:, ::5] = 0
    end = stack_run({"name": "eg", "lr": 5.0}, x, grads)
    assert torch.equal(end.sign(), x.sign())
    assert (end.abs() <= x.abs() * math.e**7 * (1 + 1e-12)).all()
    assert scalar({"name": "eg", "lr": 0.1}, -2.0, [3.0]) == pytest.approx(-2.0 * math.exp(0.3))


def test_langevin_noise_is_the_clients_own_and_has_the_stated_size() -> None:
    layout = Layout.of({"w": (100, 100)})
    ids = torch.tensor([7, 3, 9])
    zeros = torch.zeros(3, 10000)

    def run(rows: list[int], **hyper: float) -> Tensor:
        optimizer = build({"name": "sgld", "lr": 0.04, **hyper}, layout)
        x = zeros[rows].clone()
        state = optimizer.init(x)
        for _ in range(2):
            optimizer.step_(x, zeros[rows], state, streams=Streams(0, ids[rows], ids[rows] * 0))
        return x

    together = run([0, 1, 2], temperature=0.25)
    assert torch.equal(run([2, 0], temperature=0.25), together[[2, 0]])
    assert together.std(1).tolist() == pytest.approx([math.sqrt(2 * 0.04 * 0.25)] * 3, rel=0.03)
    with pytest.raises(ValueError, match="draws noise: pass streams"):
        optimizer = build({"name": "sghmc", "lr": 0.1}, layout)
        optimizer.step_(zeros.clone(), zeros, optimizer.init(zeros))


def test_sgld_drifts_by_half_the_step_on_all_data_and_prior() -> None:
    spec = {"name": "sgld", "lr": 0.1, "num_data": 10, "prior": 2.0, "temperature": 0.0}
    x, optimizer = torch.tensor([[1.0]]), build(spec, ONE)
    optimizer.step_(
        x, torch.tensor([[3.0]]), optimizer.init(x), streams=Streams(0, torch.zeros(1).long(), torch.zeros(1).long())
    )
    assert x.item() == pytest.approx(1 - 0.05 * (30 + 2))


def test_schedule_free_with_beta_one_holds_the_running_mean_of_its_base_points() -> None:
    x, grads = problem(steps=6)
    spec = {"name": "schedule_free_sgd", "lr": 0.1, "beta": 1.0}
    y = stack_run(spec, x, grads)
    points = x - 0.1 * torch.cumsum(grads, 0)
    assert torch.allclose(y, points.mean(0), atol=1e-14)


def test_sgd_sai_gain_is_the_root_of_the_size_for_centred_gradients_and_one_for_single_entries() -> None:
    layout = Layout.of({"w": (4, 4), "s": (1,)})
    g = torch.randn(2, 17, generator=torch.Generator().manual_seed(0)).double()
    g[:, :16] -= g[:, :16].mean(1, keepdim=True)
    optimizer = build({"name": "sgd_sai", "lr": 1e-3, "weight_decay": 0}, layout)
    x = torch.zeros(2, 17).double()
    state = optimizer.init(x)
    optimizer.step_(x, g, state)
    assert torch.allclose(state.buffers["gain"], torch.tensor([[math.sqrt(15), 1.0]]).double(), atol=1e-6)
    assert torch.allclose(x, -1e-3 * g * torch.cat([state.buffers["gain"][:, :1].expand(-1, 16), torch.ones(2, 1)], 1))
    optimizer.step_(x, 5 * g, state)
    assert torch.allclose(state.buffers["gain"][:, 0], torch.tensor(math.sqrt(15)).double(), atol=1e-6)
    before, m = x.clone(), 0.9 * (0.9 * g + 0.1 * 5 * g) + 0.1 * g
    optimizer.step_(x, g, state)
    assert torch.allclose(before - x, 1e-3 * m * torch.tensor([math.sqrt(15)] * 16 + [1.0]).double())


def test_sgd_sai_without_momentum_uses_the_gradient() -> None:
    moved = scalar({"name": "sgd_sai", "lr": 0.1, "momentum": 0.0}, 0.0, [1.0, -2.0, 0.5])
    assert moved == pytest.approx(-0.1 * (1 - 2 + 0.5))  # the gain of a single entry is one


def test_adamp_keeps_the_norm_of_scale_invariant_rows_to_second_order() -> None:
    layout = Layout.of({"w": (6, 20)})
    x, grads = problem(steps=1, layout=layout)
    moved = stack_run({"name": "adamp", "lr": 1e-4, "delta": 100.0}, x, grads, layout) - x
    inner = (moved.view(3, 6, 20) * x.view(3, 6, 20)).sum(-1)
    assert (inner.abs() / (moved.view(3, 6, 20).norm(dim=-1) * x.view(3, 6, 20).norm(dim=-1))).max() < 1e-7


def test_adamp_decides_per_tensor_and_client_and_scales_the_decay() -> None:
    layout = Layout.of({"w": (2, 50)})
    x = torch.zeros(2, 100).double()
    x[:, 0], x[:, 50] = 1.0, 1.0
    g = torch.ones(2, 100).double()
    g[0, 0], g[0, 50] = 0.0, 0.0  # client 0: perpendicular to x in every row; client 1: not
    spec = {"name": "adamp", "lr": 0.5, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.25}
    y = stack_run(spec, x, g[None], layout)
    assert y[0, 0].item() == pytest.approx(1 - 0.5 * 0.1 * 0.25)
    assert y[1, 0].item() == pytest.approx(1 - 0.5 * 0.1 - 0.5)


def test_stable_spam_settles_at_the_normalised_gradient_when_norms_are_steady() -> None:
    x, grads = problem(steps=1)
    steady = grads.expand(30, -1, -1)
    spec = {"name": "stable_spam", "lr": 1e-3, "gamma3": 0.5}
    optimizer, y = build(spec, LAYOUT), x.clone()
    state = optimizer.init(y)
    for g in steady:
        optimizer.step_(y, g, state)
    m = state.buffers["m"] / (1 - 0.9**30)
    norms = torch.stack([v.flatten(1).norm(dim=1) for v in LAYOUT.views(m).values()], 1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)


def test_stable_spams_official_reset_uses_the_old_moments_once_and_the_clean_one_does_not() -> None:
    base = {"name": "stable_spam", "lr": 0.1, "interval": 3}
    path = [1.0, -2.0, 0.5]
    clean, official = scalar(base, 0.0, path), scalar({**base, "official_reset": True}, 0.0, path)
    before = scalar(base, 0.0, path[:2])
    assert clean - before == pytest.approx(-0.1, rel=1e-6)  # a first step of Adam: a sign
    assert abs((official - before) - (clean - before)) > 1e-3


def test_lars_and_lamb_leave_vectors_alone_and_scale_matrices() -> None:
    x, grads = problem(steps=1)
    moved = {n: x - stack_run({"name": n, "lr": 0.1}, x, grads) for n in ("lars", "lamb")}
    assert torch.allclose(LAYOUT.views(moved["lars"])["b"], 0.1 * LAYOUT.views(grads[0])["b"])
    length = LAYOUT.views(moved["lamb"])["w"].flatten(1).norm(dim=1)
    assert torch.allclose(length, 0.1 * LAYOUT.views(x)["w"].flatten(1).norm(dim=1))


def test_auon_is_scale_free_and_bounded_and_the_package_rule_is_not() -> None:
    x, grads = problem(steps=3)
    base = {"name": "auon", "lr": 0.1, "other": {"name": "sgd", "lr": 0.0}}
    a, b = stack_run(base, x, grads), stack_run(base, x, 1000 * grads)
    assert torch.allclose(a, b, atol=1e-9)
    first = (stack_run(base, x, grads[:1]) - x)[:, : 8 * 16].norm(dim=1)
    d, near = 8 * 16, math.sqrt(1 + 1 / (8 * 16))
    assert torch.allclose(first, torch.full_like(first, 0.1 / near), rtol=1 / d**2) and (first <= 0.1).all()
    raw = stack_run({**base, "raw": True}, x, 1000 * grads) - x
    assert raw[:, :d].norm(dim=1).min() > 10


def test_adagrad_norm_of_one_number_is_adagrad() -> None:
    path = [1.0, -2.0, 0.5]
    same = scalar({"name": "adagrad", "lr": 0.1, "init": 0.25, "eps": 0}, 0.0, path)
    assert scalar({"name": "adagrad_norm", "lr": 0.1, "b0": 0.5}, 0.0, path) == pytest.approx(same)


def test_perp_grad_is_perpendicular_keeps_the_norm_and_spares_single_entries() -> None:
    layout = Layout.of({"w": (8, 4), "s": (1,), "b": (6,)})
    x, grads = problem(steps=1, layout=layout)
    for rescale in (True, False):
        g = x - stack_run({"name": "sgd", "lr": 1.0, "perp_grad": {"rescale": rescale}}, x, grads, layout)
        for name, view in layout.views(g).items():
            along = (view * layout.views(x)[name]).flatten(1).sum(1)
            full = layout.views(grads[0])[name].flatten(1)
            if name == "s":
                assert torch.allclose(view, full, atol=1e-15)
                continue
            assert along.abs().max() < 1e-13
            if rescale:
                assert torch.allclose(view.flatten(1).norm(dim=1), full.norm(dim=1))


def test_clips_by_value_tensor_and_row() -> None:
    x, grads = problem(steps=1)
    g = grads[0]
    sgd = {"name": "sgd", "lr": 1.0}
    assert torch.allclose(x - stack_run({**sgd, "clip": {"value": 0.5}}, x, grads), g.clamp(-0.5, 0.5), atol=1e-15)
    by_tensor = x - stack_run({**sgd, "clip": {"tensor": 0.5}}, x, grads)
    for view in LAYOUT.views(by_tensor).values():
        assert view.flatten(1).norm(dim=1).max() <= 0.5
    by_row = x - stack_run({**sgd, "clip": {"adaptive": 0.1}}, x, grads)
    rows, weights = LAYOUT.views(by_row)["w"].norm(dim=-1), LAYOUT.views(x)["w"].norm(dim=-1)
    assert torch.allclose(rows, 0.1 * weights, atol=1e-12)
