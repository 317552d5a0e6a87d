"""The step's semantics: order, decay, roles, masks, additive terms, clients, state, errors."""

import pickle
from typing import Any

import pytest
import torch

from fedsim import pages
from fedsim.optim import OptState, build
from fedsim.params import Layout
from tests.fedsim.optim.oracles import LAYOUT, problem, stack_run

ONE = Layout.of({"w": (1, 2)})


def step(spec: dict, x: list[float], g: list[float], **inputs: object) -> torch.Tensor:
    y = torch.tensor([x])
    optimizer = build(spec, ONE)
    optimizer.step_(y, torch.tensor([g]), optimizer.init(y), **inputs)  # type: ignore[arg-type]
    return y[0]


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("l2", 2 - 0.5 * (1 + 0.1 * 2)),
        ("decoupled", 2 * (1 - 0.5 * 0.1) - 0.5),
        ("decoupled_after", (2 - 0.5) * (1 - 0.5 * 0.1)),
        ("prox", (2 - 0.5) / (1 + 0.5 * 0.1)),
        ("independent", 2 * (1 - 0.1) - 0.5),
    ],
)
def test_each_decay_mode_is_what_its_formula_says(mode: str, expected: float) -> None:
    moved = step({"name": "sgd", "lr": 0.5, "weight_decay": 0.1, "decay": mode}, [2.0, 0.0], [1.0, 0.0])
    assert moved[0].item() == pytest.approx(expected, rel=1e-6)


def test_independent_decay_follows_the_schedule_and_not_the_rate() -> None:
    spec = {"name": "sgd", "lr": 0.5, "weight_decay": 0.1, "decay": "independent"}
    assert step(spec, [2.0, 0.0], [0.0, 0.0], lr_scale=0.5)[0].item() == pytest.approx(2 * (1 - 0.05))


def test_vectors_do_not_decay_unless_asked() -> None:
    x = torch.ones(1, LAYOUT.size)
    for asked in (False, True):
        spec = {"name": "sgd", "lr": 0.5, "weight_decay": 0.1, "decay": "decoupled", "decay_vectors": asked}
        y = x.clone()
        optimizer = build(spec, LAYOUT)
        optimizer.step_(y, torch.zeros_like(y), optimizer.init(y))
        views = LAYOUT.views(y[0])
        assert views["w"].unique().tolist() == pytest.approx([0.95])
        assert views["b"].unique().tolist() == pytest.approx([0.95 if asked else 1.0])


def test_roles_take_their_own_rules_and_multipliers() -> None:
    x, grads = problem()
    mixed = stack_run(
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "roles": {"vector": {"name": "lion", "lr": 0.2}}}, x, grads
    )
    sgd = stack_run({"name": "sgd", "lr": 0.1, "momentum": 0.9}, x, grads)
    lion = stack_run({"name": "lion", "lr": 0.2}, x, grads)
    for name, views in LAYOUT.views(mixed).items():
        assert torch.allclose(views, LAYOUT.views(lion if name == "b" else sgd)[name], atol=1e-14)
    scaled = stack_run({"name": "sgd", "lr": 0.1, "lr_mult": {"matrix": 2.0, "v": 0.0}}, x, grads)
    double, plain = (stack_run({"name": "sgd", "lr": lr}, x, grads) for lr in (0.2, 0.1))
    assert torch.allclose(LAYOUT.views(scaled)["w"], LAYOUT.views(double)["w"], atol=1e-14)
    assert torch.equal(LAYOUT.views(scaled)["b"], LAYOUT.views(plain)["b"])
    assert torch.equal(LAYOUT.views(scaled)["v"], LAYOUT.views(x)["v"])


def test_l2_decay_of_one_role_stays_in_that_role() -> None:
    x, grads = problem()
    base = {"name": "sgd", "lr": 0.1, "weight_decay": 0.5}
    mixed = stack_run({**base, "roles": {"vector": {"name": "sgd", "lr": 0.1}}}, x, grads)
    assert torch.equal(mixed, stack_run(base, x, grads))


def test_clients_may_have_their_own_rates_scales_and_counters() -> None:
    x, grads = problem()
    rates = [0.1, 0.2, 0.3]
    together = stack_run({"name": "adam", "lr": rates, "beta1": [0.9, 0.8, 0.0]}, x, grads)
    for c, (lr, beta1) in enumerate(zip(rates, [0.9, 0.8, 0.0], strict=True)):
        alone = stack_run({"name": "adam", "lr": lr, "beta1": beta1}, x[c : c + 1], grads[:, c : c + 1])
        assert torch.allclose(together[c], alone[0], atol=1e-13)
    optimizer = build({"name": "adam", "lr": 0.1}, LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    for g in grads:
        optimizer.step_(y, g, state, lr_scale=torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(y, stack_run({"name": "adam", "lr": rates}, x, grads), atol=1e-13)


def test_a_shrinking_prefix_steps_each_client_its_own_number_of_times() -> None:
    x, grads = problem(steps=5)
    optimizer = build({"name": "adamw", "lr": 0.1}, LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    for i, k in enumerate([3, 3, 2, 1, 1]):
        optimizer.step_(y[:k], grads[i, :k], state)
    assert state.t.tolist() == [5, 3, 2]
    for c, n in enumerate([5, 3, 2]):
        assert torch.allclose(y[c], stack_run({"name": "adamw", "lr": 0.1}, x, grads[:n])[c], atol=1e-14)


def test_clients_at_different_counters_step_together() -> None:
    x, grads = problem(steps=4)
    optimizer = build({"name": "adam", "lr": 0.1}, LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    optimizer.step_(y[:1], grads[0, :1], state)
    for g in grads[1:]:
        optimizer.step_(y, g, state)
    assert state.t.tolist() == [4, 3, 3]
    assert torch.allclose(y[0], stack_run({"name": "adam", "lr": 0.1}, x, grads)[0], atol=1e-14)
    assert torch.allclose(y[1], stack_run({"name": "adam", "lr": 0.1}, x, grads[1:])[1], atol=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_its_client_only_and_is_counted(bad: float) -> None:
    x, grads = problem(steps=3)
    spoiled = grads.clone()
    spoiled[1, 1, 5] = bad
    optimizer = build({"name": "adamw", "lr": 0.1}, LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    for g in spoiled:
        optimizer.step_(y, g, state)
    assert state.skipped.tolist() == [0, 1, 0] and state.t.tolist() == [3, 2, 3]
    whole = stack_run({"name": "adamw", "lr": 0.1}, x, grads)
    assert torch.allclose(y[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-15)  # counters differ now: another back end
    assert torch.allclose(y[1], stack_run({"name": "adamw", "lr": 0.1}, x, grads[[0, 2]])[1], atol=1e-15)


def test_a_large_finite_gradient_whose_sum_overflows_still_steps() -> None:
    assert step({"name": "lion", "lr": 0.5}, [1.0, 1.0], [3e38, 3e38]).tolist() == [0.5, 0.5]


def test_rows_of_a_wider_buffer_step_like_packed_ones() -> None:
    x, grads = problem()
    x, grads = x.float(), grads.float()
    wide = torch.zeros(3, LAYOUT.size + 5)
    wide[:, : LAYOUT.size] = x
    for name in ("adamw", "sgd", "lion"):
        optimizer = build({"name": name, "lr": 0.1}, LAYOUT)
        y = wide.clone()
        state = optimizer.init(y[:, : LAYOUT.size])
        for g in grads:
            optimizer.step_(y[:, : LAYOUT.size], g, state)
        assert torch.allclose(y[:, : LAYOUT.size], stack_run({"name": name, "lr": 0.1}, x, grads), atol=1e-6)
        assert not y[:, LAYOUT.size :].any()


def test_long_vectors_are_cut_into_blocks_without_a_trace() -> None:
    layout = Layout.of({"w": (350, 401), "b": (7,)})
    x, grads = problem(steps=2, clients=2, layout=layout)
    for spec in ({"name": "lion", "lr": 0.1, "weight_decay": 0.1}, {"name": "adam", "lr": 0.1, "weight_decay": 0.1}):
        whole = stack_run({**spec, "backend": "eager"}, x, grads, layout)
        part = slice(layout.size - 107, layout.size)  # the last blocks, on their own
        tail = Layout.of({"w": (1, 100), "b": (7,)})
        assert torch.allclose(whole[:, part], stack_run(spec, x[:, part], grads[:, :, part], tail), atol=1e-15)


def test_state_travels_as_named_rows_and_resumes_in_the_middle() -> None:
    x, grads = problem(steps=6)
    spec = {"name": "adamw", "lr": 0.1, "average": {"name": "ema", "decay": 0.5}}
    optimizer = build(spec, LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    for g in grads[:3]:
        optimizer.step_(y, g, state)
    rows = pickle.loads(pickle.dumps({n: v[[2, 0, 1]] for n, v in state.to_rows().items()}))
    assert all(len(v) == 3 for v in rows.values())
    y, state, optimizer = y[[2, 0, 1]], OptState.from_rows(rows), pickle.loads(pickle.dumps(optimizer))
    for g in grads[3:]:
        optimizer.step_(y, g[[2, 0, 1]], state)
    assert torch.equal(optimizer.final(y, state)[[1, 2, 0]], stack_run(spec, x, grads, final=True))


def test_big_states_begin_apart_from_the_parameters_and_from_each_other() -> None:
    x = torch.zeros(2, pages.SMALLEST_APART)
    spec = {"name": "adan", "lr": 0.1, "average": {"name": "ema", "decay": 0.5}}
    buffers = build(spec, Layout.of({"w": (1, x.shape[1])})).init(x).buffers
    starts = [(b.data_ptr() - x.data_ptr()) % 4096 for b in buffers.values()]
    assert starts == [i * pages.APART % 4096 for i in range(1, 6)]


def test_gathered_clients_are_copies_in_the_order_asked_for() -> None:
    x, grads = problem(steps=2)
    optimizer = build({"name": "adagrad", "lr": 0.1}, LAYOUT)
    state = optimizer.init(x)
    optimizer.step_(x[:2], grads[0, :2], state)
    taken, kept = state.gather([2, 0]), state.buffers["a"].clone()
    optimizer.step_(x, grads[1], state)
    assert taken.t.tolist() == [0, 1] and torch.equal(taken.buffers["a"], kept[[2, 0]])


def test_ema_and_swa_are_what_they_say_and_are_what_is_sent() -> None:
    layout = Layout.of({"w": (1, 1)})
    x, grads = torch.tensor([[1.0]]), torch.tensor([[[1.0]], [[1.0]]])  # x: 1, 0, -1
    ema = stack_run({"name": "sgd", "lr": 1.0, "average": {"name": "ema", "decay": 0.75}}, x, grads, layout, final=True)
    assert ema.item() == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 0) + 0.25 * -1)
    swa = stack_run({"name": "sgd", "lr": 1.0, "average": {"name": "swa"}}, x, grads, layout, final=True)
    assert swa.item() == pytest.approx(-0.5)
    optimizer = build({"name": "sgd", "lr": 1.0, "average": {"name": "swa"}}, layout)
    assert torch.equal(optimizer.final(x, optimizer.init(x)), x)


def test_plain_sgd_says_so_and_nothing_else_does() -> None:
    assert build({"name": "sgd", "lr": 0.1}, LAYOUT).is_plain_sgd
    assert build({"name": "sgd", "lr": 0.1}, LAYOUT).lr == 0.1
    others = [
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"clip": {"value": 1.0}},
        {"perp_grad": True},
        {"lr_mult": {"b": 2}},
    ]
    for extra in (*others, {"average": {"name": "swa"}}, {"roles": {"vector": {"name": "sgd", "lr": 1.0}}}):
        assert not build({"name": "sgd", "lr": 0.1, **extra}, LAYOUT).is_plain_sgd, extra
    assert not build({"name": "adam"}, LAYOUT).is_plain_sgd


def test_momentum_is_known_of_a_step_that_is_nothing_else() -> None:
    def momentum(**spec: Any) -> float | None:
        return build({"name": "sgd", "lr": 0.1, **spec}, LAYOUT).momentum

    assert momentum() == 0 and momentum(momentum=0.9) == 0.9
    for extra in (
        {"nesterov": True},
        {"dampening": 0.1},
        {"ema": True},
        {"weight_decay": 0.1},
        {"clip": {"global": 1}},
    ):
        assert momentum(momentum=0.9, **extra) is None, extra
    assert build({"name": "adam"}, LAYOUT).momentum is None
    assert momentum(momentum=[0.9, 0.5]) is None


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"name": "lionn"}, "optimizer.name: unknown name 'lionn'; did you mean 'lion'"),
        ({"name": "sgd"}, "optimizer.lr: missing; sgd has no customary"),
        ({"lr": 0.1}, r"optimizer: expected a name or {name: ..., ...}, got {.lr.: 0.1}"),
        ({"name": "sgd", "lr": 0.1, "momentun": 0.9}, "optimizer.momentun: unknown key; did you mean 'momentum'"),
        ({"name": "sgd", "lr": "fast"}, "optimizer.lr: expected a number or a list of numbers, got 'fast'"),
        ({"name": "sgd", "lr": -1}, r"optimizer.lr: must lie in \[0, inf\), got -1.0"),
        ({"name": "sgd", "lr": 1, "momentum": 1.5}, r"optimizer.momentum: must lie in \[0, 1\], got 1.5"),
        ({"name": "sgd", "lr": 1, "nesterov": 1}, "optimizer.nesterov: expected true or false, got 1"),
        ({"name": "sgd", "lr": 1, "decay": "l3"}, "optimizer.decay: expected one of l2, decoupled"),
        ({"name": "sgd", "lr": 1, "decay": "in_update"}, "does not put the decay into its update"),
        ({"name": "sgd", "lr": 1, "clip": {"globl": 1}}, "did you mean 'global'"),
        ({"name": "sgd", "lr": 1, "clip": {"global": 0}}, "must be positive"),
        ({"name": "sgd", "lr": 1, "roles": {"vectr": {"name": "sgd", "lr": 1}}}, "did you mean 'vector'"),
        ({"name": "sgd", "lr": 1, "lr_mult": {"weight": 2}}, "unknown role or tensor 'weight'"),
        ({"name": "sgd", "lr": 1, "state_scope": "epoch"}, "optimizer.state_scope: expected one of round"),
        ({"name": "lion", "backend": "fused"}, "torch has no fused kernel"),
    ],
)
def test_a_bad_section_is_refused_with_the_way_out(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec, LAYOUT)


def test_an_unknown_input_and_too_few_hyper_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="aux 'hvp' is no input"):
        step({"name": "sgd", "lr": 0.1}, [0.0, 0.0], [1.0, 1.0], aux={"hvp": torch.zeros(2)})
    x, grads = problem()
    with pytest.raises(ValueError, match="lr has 2 numbers for a stack of 3 clients"):
        stack_run({"name": "sgd", "lr": [0.1, 0.2]}, x, grads)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_settings_at_their_defaults_change_no_bit_and_a_scale_for_each_client_little(name: str) -> None:
    x, grads = (t.float() for t in problem())
    grads[2, 1, 0] = float("nan")
    ends = []
    for unused in ({}, {"skip_nonfinite": True, "lr_mult": {"w": 1.0}}):
        optimizer = build({"name": name, "lr": 0.1, "weight_decay": 0.1, "decay": "decoupled", **unused}, LAYOUT)
        for scale in (0.5, torch.full((3,), 0.5)):
            y = x.clone()
            state = optimizer.init(y)
            for g in grads:
                optimizer.step_(y, g, state, lr_scale=scale)
            ends.append((y, state))
    assert all(s.t.tolist() == [7, 6, 7] and s.skipped.tolist() == [0, 1, 0] for _, s in ends)
    assert torch.equal(ends[0][0], ends[2][0])
    assert all(torch.allclose(y, ends[0][0], rtol=1e-6, atol=1e-6) for y, _ in ends)
