"""GaLore against galore-torch and plain loops; signs, alignment, counters and inner rules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from fedsim.optim import build
from fedsim.optim.rules.galore import leading_columns, sketched_columns
from fedsim.params import Layout
from tests.fedsim.optim.oracles import client_runs, error, problem, stack_run, state_bytes

LAYOUT = Layout.of({"tall": (16, 6), "bias": (5,), "wide": (6, 16), "again": (16, 6), "square": (7, 7)})
SPEC = {"name": "galore", "lr": 0.01, "rank": 3, "gap": 3}


@pytest.fixture
def galore_adamw(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """galore-torch's optimizer, its imports that are not needed here stubbed, its singular vectors with fixed signs."""
    spec = find_spec("galore_torch")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("galore-torch is not installed")
    package = ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    versions = ModuleType("transformers.utils.versions")
    versions.require_version = lambda *args: None  # type: ignore[attr-defined]
    stubs = {"galore_torch": package, "transformers.utils.versions": versions}
    for name in ("transformers", "transformers.utils"):
        stubs[name] = ModuleType(name)
    for name, module in stubs.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "galore_torch.adamw", raising=False)
    svd = torch.linalg.svd

    def with_fixed_signs(m: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = svd(m, full_matrices=full_matrices)
        kept = vh if m.shape[-2] >= m.shape[-1] else u.mT  # the side that becomes the basis
        flip = torch.stack([torch.sign(row[row.abs().argmax()]) for row in kept])
        return u * flip, s, vh * flip[:, None]

    adamw = importlib.import_module("galore_torch.adamw").AdamW

    def make(params: list[nn.Parameter], **hyper: Any) -> Any:
        matrices = {"params": [p for p in params if p.ndim == 2], "proj_type": "std", **hyper}
        vectors = {"params": [p for p in params if p.ndim < 2]}
        optimizer = adamw([vectors, matrices], lr=0.01, weight_decay=0.1, no_deprecation_warning=True)
        plain = optimizer.step

        def step() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(torch.linalg, "svd", with_fixed_signs)
                plain()

        optimizer.step = step
        return optimizer

    return make


def test_a_stack_equals_galore_torch_client_by_client_over_three_refreshes(galore_adamw: Callable[..., Any]) -> None:
    x, grads = (t.float() for t in problem(layout=LAYOUT))
    theirs = client_runs(lambda p: galore_adamw(p, rank=3, update_proj_gap=3, scale=0.25), x, grads, LAYOUT)
    spec = {**SPEC, "weight_decay": 0.1, "decay_vectors": True}
    assert (stack_run(spec, x, grads, LAYOUT) - theirs).abs().max() < 2e-6
    other = stack_run({**spec, "decay": "decoupled"}, x, grads, LAYOUT)  # decay before the step is another rule
    assert (other - theirs).abs().max() > 1e-5


def test_full_rank_and_an_inner_sgd_are_sgd() -> None:
    spec = {**SPEC, "rank": 16, "scale": 1.0, "lr": 0.1, "inner": {"name": "sgd"}}
    assert error(lambda p: optim.SGD(p, 0.1), spec, layout=LAYOUT) < 1e-13


def test_vectors_get_adamw_with_raw_eps_at_the_same_rate() -> None:
    x, grads = problem(layout=LAYOUT)
    ours = stack_run({**SPEC, "weight_decay": 0.1, "decay_vectors": True}, x, grads, LAYOUT)
    alone = stack_run({"name": "adamw_hf", "lr": 0.01, "weight_decay": 0.1, "decay_vectors": True}, x, grads, LAYOUT)
    bias = slice(LAYOUT.offsets[1], LAYOUT.offsets[2])
    assert torch.allclose(ours[:, bias], alone[:, bias], rtol=0, atol=1e-15)


def test_the_signs_that_the_library_returns_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grads = problem(layout=LAYOUT)
    expected = stack_run(SPEC, x, grads, LAYOUT)
    svd = torch.linalg.svd

    def other_signs(m: Tensor, full_matrices: bool = True) -> Any:
        u, s, vh = svd(m, full_matrices=full_matrices)
        flip = torch.tensor([-1.0, 1.0])[torch.arange(vh.shape[-2]) % 2].to(m)
        return SimpleNamespace(U=u * flip, S=s, Vh=vh * flip[:, None])

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    assert torch.equal(stack_run(SPEC, x, grads, LAYOUT), expected)


def test_leading_columns_are_orthonormal_span_the_largest_part_and_peak_above_zero() -> None:
    m = problem(1)[0][:, :128].view(3, 16, 8)
    basis = leading_columns(m, 3)
    assert torch.allclose(basis.mT @ basis, torch.eye(3, dtype=m.dtype).expand(3, 3, 3), atol=1e-13)
    kept = (m @ basis).square().sum((-2, -1))
    assert torch.allclose(kept, torch.linalg.svdvals(m)[:, :3].square().sum(-1))
    assert (basis.amax(-2) == basis.abs().amax(-2)).all()


def test_aligned_columns_keep_a_positive_product_with_the_old_ones() -> None:
    layout = Layout.of({"w": (12, 5)})
    x, grads = problem(4, layout=layout)
    products = {}
    for align in (False, True):
        optimizer = build({**SPEC, "gap": 1, "align": align}, layout)
        y = x.clone()
        state = optimizer.init(y)
        seen = []
        for g in grads:
            old = state.buffers["basis"].clone()
            optimizer.step_(y, g, state)
            seen.append((old * state.buffers["basis"]).view(3, 5, 3).sum(1))
        products[align] = torch.stack(seen)
    assert (products[True] >= 0).all() and (products[False] < 0).any()


@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_without_singular_vectors_is_noticed_and_leaves_the_other_clients_alone(
    bad: float, basis: str
) -> None:
    x, (g, *_) = problem(layout=LAYOUT)
    optimizer, doubt = build({**SPEC, "basis": basis}, LAYOUT), torch.zeros((), dtype=x.dtype)
    sound, spoilt = x.clone(), x.clone()
    optimizer.step_(sound, g, optimizer.init(x))
    g[1, 0] = bad
    optimizer.step_(spoilt, g, optimizer.init(x), doubt=doubt)
    assert not doubt.isfinite() and torch.equal(spoilt[[0, 2]], sound[[0, 2]])


def test_a_client_refreshes_at_its_own_steps() -> None:
    x, grads = problem(7, clients=2, layout=LAYOUT)
    optimizer = build(SPEC, LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    for i, g in enumerate(grads):
        optimizer.step_(y[: 1 if i < 2 else 2], g[: 1 if i < 2 else 2], state)  # the second begins two steps late
    assert torch.allclose(y[:1], stack_run(SPEC, x[:1], grads[:, :1], LAYOUT), rtol=0, atol=1e-14)
    assert torch.allclose(y[1:], stack_run(SPEC, x[1:], grads[2:, 1:], LAYOUT), rtol=0, atol=1e-14)


def test_state_is_two_low_rank_moments_and_a_basis() -> None:
    layout = Layout.of({"w": (16, 6), "v": (6, 20)})
    low = 16 * 3 + 20 * 3
    assert state_bytes(SPEC, layout) == 4 * (2 * low + 2 * 6 * 3)
    assert state_bytes({**SPEC, "rank": 100}, layout) == 4 * (2 * (16 * 6 + 20 * 6) + 2 * 6 * 6)


# The randomized basis ---------------------------------------------------------------------------------------------

BIG = Layout.of({"tall": (60, 40), "bias": (5,), "wide": (30, 50), "again": (60, 40), "small": (7, 7)})
SKETCHED = {**SPEC, "basis": "randomized"}


def with_spectrum(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """[2, rows, columns] with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(2, n, len(values), generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return u * values @ v.mT


def test_a_sketch_finds_the_singular_vectors_of_a_gradient_whose_rank_it_reaches() -> None:
    for values in ([5.0, 3.0, 2.0, 1.0], [4.0, 1.0]):
        m = with_spectrum(torch.tensor(values).double(), 50, 30)
        found = sketched_columns(m, 4)
        assert torch.allclose(found.mT @ found, torch.eye(4).double().expand(2, 4, 4), atol=1e-13)
        assert torch.allclose(m @ found @ found.mT, m, atol=1e-13)
        known = len(values)
        assert torch.allclose(found[..., :known], leading_columns(m, 4)[..., :known], atol=1e-10)
        assert (found.amax(-2) == found.abs().amax(-2)).all()


@pytest.mark.parametrize(
    "spectrum, share",
    [(0.8 ** torch.arange(100.0), 0.9999), (1 / torch.arange(1.0, 101), 0.995), (torch.ones(100), 1 - 1e-12)],
    ids=["fast decay", "slow decay", "none"],
)
def test_a_sketch_captures_nearly_the_energy_of_the_svd(spectrum: Tensor, share: float) -> None:
    m = with_spectrum(spectrum.double(), 150, 100)
    energy = [(m @ columns(m, 16)).square().sum((-2, -1)) for columns in (sketched_columns, leading_columns)]
    assert bool((energy[0] >= share * energy[1]).all()) and bool((energy[0] <= energy[1] * (1 + 1e-12)).all())


def test_a_sketch_of_noise_captures_most_of_it() -> None:
    """The hardest case: no singular value stands out."""
    m = torch.randn(2, 150, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy = [(m @ columns(m, 16)).square().sum() for columns in (sketched_columns, leading_columns)]
    assert energy[0] >= 0.9 * energy[1]


def test_a_side_that_the_sketch_would_fill_takes_the_svd() -> None:
    m = problem(1)[0][:, :128].view(3, 16, 8)
    assert torch.equal(sketched_columns(m, 3), leading_columns(m, 3))
    x, grads = problem(layout=LAYOUT)
    assert torch.equal(stack_run(SKETCHED, x, grads, LAYOUT), stack_run(SPEC, x, grads, LAYOUT))


def test_the_signs_of_a_librarys_factors_do_not_show_in_a_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    m = with_spectrum(0.7 ** torch.arange(30.0).double(), 50, 30)
    expected = sketched_columns(m, 3)
    qr = torch.linalg.qr

    def other_signs(a: Tensor) -> Any:
        q, r = qr(a)
        flip = torch.tensor([-1.0, 1.0])[torch.arange(q.shape[-1]) % 2].to(a)
        return torch.return_types.linalg_qr((q * flip, flip[:, None] * r))

    monkeypatch.setattr(torch.linalg, "qr", other_signs)
    assert torch.allclose(sketched_columns(m, 3), expected, atol=1e-12)


def test_a_client_of_a_stack_has_the_basis_that_it_has_alone() -> None:
    x, grads = problem(7, clients=7, layout=BIG)
    whole = stack_run(SKETCHED, x, grads, BIG)
    for rows in ([4], [3, 6, 0, 5]):
        assert torch.allclose(stack_run(SKETCHED, x[rows], grads[:, rows], BIG), whole[rows], rtol=0, atol=1e-12)
    assert (whole - stack_run(SPEC, x, grads, BIG)).abs().max() > 1e-4, "on noise it is another basis than the svd's"
    optimizer, y = build(SKETCHED, BIG), x.clone()
    state = optimizer.init(y)
    for i, g in enumerate(grads):
        k = 3 if i < 2 else 7  # the last four begin two steps late, and refresh two steps late
        optimizer.step_(y[:k], g[:k], state)
    assert torch.allclose(y[:3], whole[:3], rtol=0, atol=1e-12)
    assert torch.allclose(y[3:], stack_run(SKETCHED, x[3:], grads[2:, 3:], BIG), rtol=0, atol=1e-12)


def test_low_rank_gradients_give_the_steps_of_the_svd() -> None:
    x, _ = problem(layout=BIG)
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(5, *x.shape, generator=generator, dtype=torch.float64)
    for view in BIG.views(grads.view(-1, BIG.size)).values():
        if view.ndim == 3:
            u, s, vh = torch.linalg.svd(view, full_matrices=False)
            view.copy_((u[..., :3] * s[..., None, :3]) @ vh[..., :3, :])
    assert torch.allclose(stack_run(SKETCHED, x, grads, BIG), stack_run(SPEC, x, grads, BIG), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "sgd", "lion", "rmsprop", "adagrad"])
def test_any_inner_rule_sees_the_low_rank_gradient(name: str) -> None:
    """With gap 1 and full rank the picture is M V: the inner rule alone, on M V, must do the same."""
    layout = Layout.of({"w": (9, 4)})
    x, grads = problem(1, layout=layout)
    spec = {**SPEC, "rank": 4, "scale": 1.0, "inner": {"name": name}}
    moved = x - stack_run(spec, x, grads, layout)
    m = grads[0].view(3, 9, 4)
    basis = leading_columns(m, 4)
    inside = (m @ basis).flatten(1)
    alone = -stack_run({"name": name, "lr": 0.01, "weight_decay": 0.0}, 0 * inside, inside[None], layout)
    assert torch.allclose(moved.view(3, 9, 4), alone.view(3, 9, 4) @ basis.mT, atol=1e-12)


@pytest.mark.parametrize(
    "inner, message",
    [
        ({"name": "adammm"}, "inner.name: unknown name 'adammm'; did you mean 'adam'"),
        ({"name": "adam", "beta3": 1.0}, "inner.beta3: unknown key; did you mean 'beta"),
        ({"name": "adam", "beta1": [0.9, 0.8]}, "inner.beta1: must be one number for all clients"),
    ],
)
def test_a_wrong_inner_rule_is_refused(inner: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({**SPEC, "inner": inner}, LAYOUT)


def test_bases_have_no_mean_over_clients() -> None:
    with pytest.raises(ValueError, match="server averages states over clients, and basis of optimizer.GaLore"):
        build({**SPEC, "state_scope": "server"}, LAYOUT)


def test_an_unknown_basis_is_refused() -> None:
    with pytest.raises(ValueError, match="basis"):
        build({**SPEC, "basis": "shared"}, LAYOUT)
