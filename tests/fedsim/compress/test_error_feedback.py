import pytest
import torch

from fedsim.compress.error_feedback import Contractive, compress_difference, compress_with_error, contractive
from fedsim.compress.quantize import QSGD, Natural
from fedsim.compress.sparsify import Bernoulli, RandK, TopK
from tests.build import sender, streams


def test_what_was_sent_and_the_last_error_add_up_to_what_was_given() -> None:
    g = torch.Generator().manual_seed(0)
    error = torch.zeros(3, 40, dtype=torch.float64)
    given, sent = error.clone(), error.clone()
    for step in range(20):
        v = torch.randn(3, 40, generator=g, dtype=torch.float64)
        packet, error = compress_with_error(v, error, TopK(k=4), sender(streams(3), step))
        given, sent = given + v, sent + packet.decode()
    assert torch.allclose(sent + error, given, atol=1e-12)


def test_error_feedback_worked_by_hand() -> None:
    v, error = torch.tensor([[3.0, 2.0]]), torch.zeros(1, 2)
    packet, error = compress_with_error(v, error, TopK(k=1), sender(streams(1)))
    assert packet.decode().tolist() == [[3.0, 0.0]] and error.tolist() == [[0.0, 2.0]]
    packet, error = compress_with_error(v, error, TopK(k=1), sender(streams(1)))
    assert packet.decode().tolist() == [[0.0, 4.0]] and error.tolist() == [[3.0, 0.0]]


def heterogeneous(n: int = 4, d: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Quadratics f_i = a_i / 2 |x - b_i|^2 in every coordinate: a [n, d] and b [n, d]."""
    g = torch.Generator().manual_seed(1)
    return 0.5 + torch.rand(n, d, generator=g, dtype=torch.float64), torch.randn(n, d, generator=g, dtype=torch.float64)


def test_ef21_is_exact_where_plain_compression_is_not() -> None:
    a, b = heterogeneous()
    best = (a * b).sum(0) / a.sum(0)
    own, lr = streams(4), 0.1

    def distance(estimate) -> float:  # type: ignore[no-untyped-def]
        x = torch.zeros(10, dtype=torch.float64)
        for step in range(700):
            x = x - lr * estimate(a * (x - b), step)
        return float((x - best).norm())

    def ef21(compressor):  # type: ignore[no-untyped-def]
        reference = torch.zeros(4, 10, dtype=torch.float64)

        def estimate(gradients: torch.Tensor, step: int) -> torch.Tensor:
            nonlocal reference
            _, reference = compress_difference(gradients, reference, compressor, sender(own, step))
            return reference.mean(0)

        return estimate

    rand = RandK(k=2)
    assert distance(ef21(TopK(k=2))) < 1e-12
    assert distance(ef21(rand)) < 1e-8  # expands as it stands, omega = 4
    assert distance(lambda g, step: rand.encode(g, own, step).decode().mean(0)) > 0.05  # DCGD
    assert distance(lambda g, step: TopK(k=2).encode(g, own, step).decode().mean(0)) > 0.05


@pytest.mark.parametrize("compressor", [RandK(k=2), QSGD(levels=1), Bernoulli(p=0.2)])
def test_what_an_expanding_compressor_leaves_out_stays_bounded(compressor) -> None:  # type: ignore[no-untyped-def]
    v, error = torch.randn(50, 20, dtype=torch.float64), torch.zeros(50, 20, dtype=torch.float64)
    reference = error
    delta = 1 + compressor.omega(20)
    for step in range(200):
        _, error = compress_with_error(v, error, compressor, sender(streams(50), step))
        _, reference = compress_difference(v, reference, compressor, sender(streams(50), step))
    # e <- (1 - 1/delta) |v + e|^2 in the mean: its fixed point is below (2 delta)^2 |v|^2 (Karimireddy et al. 2019)
    assert float(error.square().sum(1).mean()) < 4 * delta**2 * float(v.square().sum(1).mean())
    assert float((reference - v).square().sum(1).mean()) < 1e-3 * float(v.square().sum(1).mean())


def test_a_compressor_that_contracts_as_it_stands_is_left_as_it_is() -> None:
    for compressor in (TopK(k=2), Natural(), QSGD(levels=16)):
        assert contractive(compressor, 20) is compressor
    assert contractive(RandK(k=2), 20).delta(20) == 10.0


def test_ef14_comes_nearer_with_a_smaller_step() -> None:
    a, b = heterogeneous()
    best = (a * b).sum(0) / a.sum(0)

    def distance(lr: float, steps: int) -> float:
        x, error = torch.zeros(10, dtype=torch.float64), torch.zeros(4, 10, dtype=torch.float64)
        for step in range(steps):
            packet, error = compress_with_error(lr * a * (x - b), error, TopK(k=2), sender(streams(4), step))
            x = x - packet.decode().mean(0)
        return float((x - best).norm())

    assert distance(0.01, 1500) < 0.2 * distance(0.1, 300)


def test_an_unbiased_compressor_divided_by_one_plus_omega_contracts() -> None:
    v = torch.randn(20, dtype=torch.float64)
    scaled = Contractive(of=RandK(k=5))
    assert scaled.delta(20) == 4.0 and scaled.bits(20) == RandK(k=5).bits(20) and not scaled.unbiased
    sent = scaled.encode(v.expand(4000, -1), streams(4000)).decode()
    errors = (sent - v).square().sum(dim=1) / v.square().sum()
    assert float(errors.mean()) == pytest.approx(1 - 1 / 4, abs=4 * float(errors.std()) / 4000**0.5)
    with pytest.raises(ValueError, match="biased"):
        Contractive(of=TopK(k=1))
    assert Contractive(of=QSGD(levels=1)).delta(16) == 5.0
