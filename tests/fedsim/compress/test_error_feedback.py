import pytest
import torch

from fedsim.compress.error_feedback import Contractive, compress_difference, compress_with_error
from fedsim.compress.quantize import QSGD
from fedsim.compress.sparsify import RandK, TopK
from fedsim.streams import Streams


def streams(rows: int) -> Streams:
    return Streams(5, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))


def test_what_was_sent_and_the_last_error_add_up_to_what_was_given() -> None:
    g = torch.Generator().manual_seed(0)
    error = torch.zeros(3, 40, dtype=torch.float64)
    given, sent = error.clone(), error.clone()
    for step in range(20):
        v = torch.randn(3, 40, generator=g, dtype=torch.float64)
        packet, error = compress_with_error(v, error, TopK(k=4), streams(3), step)
        given, sent = given + v, sent + packet.decode()
    assert torch.allclose(sent + error, given, atol=1e-12)


def test_error_feedback_worked_by_hand() -> None:
    v, error = torch.tensor([[3.0, 2.0]]), torch.zeros(1, 2)
    packet, error = compress_with_error(v, error, TopK(k=1), streams(1))
    assert packet.decode().tolist() == [[3.0, 0.0]] and error.tolist() == [[0.0, 2.0]]
    packet, error = compress_with_error(v, error, TopK(k=1), streams(1))
    assert packet.decode().tolist() == [[0.0, 4.0]] and error.tolist() == [[3.0, 0.0]]


def heterogeneous(n: int = 4, d: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Quadratics f_i = a_i / 2 |x - b_i|^2 in every coordinate: a [n, d] and b [n, d]."""
    g = torch.Generator().manual_seed(1)
    return 0.5 + torch.rand(n, d, generator=g, dtype=torch.float64), torch.randn(n, d, generator=g, dtype=torch.float64)


def test_ef21_and_diana_are_exact_where_plain_compression_is_not() -> None:
    a, b = heterogeneous()
    best = (a * b).sum(0) / a.sum(0)
    own, lr = streams(4), 0.1

    def distance(estimate) -> float:  # type: ignore[no-untyped-def]
        x = torch.zeros(10, dtype=torch.float64)
        for step in range(1500):
            x = x - lr * estimate(a * (x - b), step)
        return float((x - best).norm())

    def keeping_reference(compressor, rate: float, moved: bool):  # type: ignore[no-untyped-def]
        reference = torch.zeros(4, 10, dtype=torch.float64)

        def estimate(gradients: torch.Tensor, step: int) -> torch.Tensor:
            nonlocal reference
            before = reference
            packet, reference = compress_difference(gradients, reference, compressor, own, step, rate)
            return reference.mean(0) if moved else (before + packet.decode()).mean(0)

        return estimate

    rand = RandK(k=2)
    omega = rand.omega(10)
    assert omega == 4.0
    assert distance(keeping_reference(TopK(k=2), 1.0, True)) < 1e-12  # EF21
    assert distance(keeping_reference(rand, 1.0 / (1.0 + omega), False)) < 1e-8  # DIANA
    assert distance(lambda g, step: rand.encode(g, own, step).decode().mean(0)) > 0.05  # DCGD
    assert distance(lambda g, step: TopK(k=2).encode(g, own, step).decode().mean(0)) > 0.05


def test_ef14_comes_nearer_with_a_smaller_step() -> None:
    a, b = heterogeneous()
    best = (a * b).sum(0) / a.sum(0)

    def distance(lr: float, steps: int) -> float:
        x, error = torch.zeros(10, dtype=torch.float64), torch.zeros(4, 10, dtype=torch.float64)
        for step in range(steps):
            packet, error = compress_with_error(lr * a * (x - b), error, TopK(k=2), streams(4), step)
            x = x - packet.decode().mean(0)
        return float((x - best).norm())

    assert distance(0.01, 4000) < 0.2 * distance(0.1, 1000)


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
