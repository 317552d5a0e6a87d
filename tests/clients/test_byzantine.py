from statistics import NormalDist

import pytest
import torch

from fedsim.clients.byzantine import (
    Alie,
    Backdoor,
    Gaussian,
    InnerProduct,
    LabelFlip,
    Mimic,
    ModelReplacement,
    SignFlip,
    Silence,
    alie_factor,
)
from fedsim.fleet import TooFewRows
from fedsim.sim.byzantine import Knowledge
from tests.build import streams

H = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])


def sent(attack, honest: torch.Tensor = H, b: int = 2) -> torch.Tensor:  # type: ignore[no-untyped-def]
    out = attack(honest, b, streams(b), Knowledge())
    assert out is not None
    return out


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (SignFlip(), [-4.0, -5.0, -6.0]),
        (SignFlip(scaled=True), [-6.0, -7.5, -9.0]),  # times 3 / 2
        (InnerProduct(), [-8.0, -10.0, -12.0]),
        (InnerProduct(tau=0.5), [-2.0, -2.5, -3.0]),
        (Alie(), [8.5, 9.5, 10.5]),
        (Alie(k=-1.5), [-0.5, 0.5, 1.5]),
        (Mimic(), [1.0, 2.0, 3.0]),
        (Mimic(target=2), [7.0, 8.0, 9.0]),
    ],
)
def test_the_documented_example(attack, expected: list[float]) -> None:  # type: ignore[no-untyped-def]
    assert sent(attack).tolist() == [expected, expected]


def test_a_scaled_sign_flip_makes_the_mean_of_all_zero() -> None:
    everyone = torch.cat([H, sent(SignFlip(scaled=True))])
    assert torch.allclose(everyone.mean(dim=0), torch.zeros(3))


def test_the_largest_factor_of_alie() -> None:
    # n = 50, b = 24: 26 - 24 = 2 of the 26 honest ones must be outvoted.
    assert alie_factor(50, 24) == pytest.approx(NormalDist().inv_cdf(24 / 26))
    assert alie_factor(26, 5) == pytest.approx(NormalDist().inv_cdf((21 - 9) / 21))
    honest = torch.randn(21, 4, generator=torch.Generator().manual_seed(0))
    expected = honest.mean(0) + alie_factor(26, 5) * honest.std(0)
    assert torch.allclose(sent(Alie(k="max"), honest, 5)[0], expected)
    with pytest.raises(ValueError, match="n=4 clients with b=3"):
        alie_factor(4, 3)
    with pytest.raises(ValueError, match="alie.k"):
        Alie(k="most")  # type: ignore[arg-type]


def test_alie_with_one_honest_client_has_no_spread_to_hide_in() -> None:
    assert sent(Alie(), H[:1]).tolist() == [[1.0, 2.0, 3.0]] * 2


def _against(rule, honest: torch.Tensor) -> Knowledge:  # type: ignore[no-untyped-def]
    """Knowledge of a rule that gets the honest rows and then those sent."""
    return Knowledge(rule=lambda out: rule(torch.cat([honest, out.to(honest)])))


def test_against_a_mean_the_factor_grows_as_long_as_there_are_tries() -> None:
    known = _against(lambda rows: rows.mean(0), H)
    k = 10 * (2**19 - 1)  # 20 tries: 0, then 19 steps that double from 10
    out = Alie(k="optimised")(H, 2, streams(2), known)
    assert out is not None and torch.allclose(out, (H.mean(0) + k * H.std(0)).expand(2, -1))
    out = InnerProduct(tau="optimised")(H, 2, streams(2), known)
    assert out is not None and torch.allclose(out, (-k * H.mean(0)).expand(2, -1))


def test_against_a_rule_that_sees_through_it_the_factor_is_the_largest_that_passes() -> None:
    def gate(rows: torch.Tensor) -> torch.Tensor:  # believes what is not farther than 4 deviations from the mean
        return rows[-1] if bool((rows[-1] <= H.mean(0) + 4 * H.std(0)).all()) else H.mean(0)

    out = Alie(k="optimised")(H, 1, streams(1), _against(gate, H))
    assert out is not None
    k = float(((out[0] - H.mean(0)) / H.std(0))[0])
    assert 3.9 < k <= 4.0  # steps 10, 8, 6.4, 5.1 are too long, 4.1 as well, then 3.3 and what still fits


def test_with_too_few_rows_for_the_rule_anything_does_and_without_a_rule_nothing() -> None:
    def refuses(rows: torch.Tensor) -> torch.Tensor:
        raise TooFewRows("never enough")

    out = InnerProduct(tau="optimised")(H, 2, streams(2), _against(refuses, H))
    assert out is not None and torch.equal(out, torch.zeros(2, 3))
    for attack in (InnerProduct(tau="optimised"), Alie(k="optimised")):
        with pytest.raises(ValueError, match="=optimised tries factors against what is made of the replies"):
            sent(attack)


def test_mimic_learns_the_direction_in_which_clients_differ() -> None:
    g = torch.Generator().manual_seed(0)
    honest = 0.1 * torch.randn(6, 20, generator=g)
    honest[4, 7], honest[2, 7] = 5.0, -3.0
    attack, context = Mimic(warmup=3), Knowledge()
    for step in range(3):
        context.step = step
        out = attack(honest, 2, streams(2), context)
        assert out is not None and torch.equal(out[0], honest[0])
    out = attack(honest, 2, streams(2), context)
    assert out is not None and torch.equal(out, honest[4].expand(2, -1))
    assert abs(float(context.memory["mimic.direction"][7])) > 0.9
    fresh = attack(honest, 2, streams(2), Knowledge())  # what it knows lies in the context alone
    assert fresh is not None and torch.equal(fresh[0], honest[0])


def test_noise_is_normal_and_another_for_each_client_and_step() -> None:
    attack, honest = Gaussian(mean=2.0, std=3.0), torch.zeros(1, 20_000)
    noise = sent(attack, honest)
    assert float(noise.mean()) == pytest.approx(2.0, abs=4 * 3 / 200)
    assert float(noise.std()) == pytest.approx(3.0, rel=0.03)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(attack(honest, 2, streams(2), Knowledge(step=1)), noise)


def test_the_silent_send_nothing() -> None:
    assert Silence()(H, 2, streams(2), Knowledge()) is None


def test_flipped_labels_count_from_the_other_end() -> None:
    inputs, targets = torch.zeros(2, 2, 3), torch.tensor([[0, 1], [4, 9]])
    shown, labels = LabelFlip().wanted(inputs, targets, 10)
    assert shown is inputs and labels.tolist() == [[9, 8], [5, 0]]


def test_a_trigger_is_a_patch_in_the_corner_of_a_copy() -> None:
    images = torch.zeros(2, 1, 3, 4)
    shown, labels = Backdoor(target=7, size=2, value=0.5).wanted(images, torch.tensor([1, 7]), 10)
    assert isinstance(shown, torch.Tensor)
    assert shown[1, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]
    assert labels.tolist() == [7, 7] and not bool(images.any())
    for inputs, words in ((torch.zeros(2, 12), "is no image"), (torch.zeros(2, 1, 2, 9), "is 2 x 9 pixels")):
        with pytest.raises(ValueError, match=f"backdoor writes a patch of 3 x 3 pixels.*{words}"):
            Backdoor().wanted(inputs, torch.zeros(2, dtype=torch.int64), 10)
    with pytest.raises(ValueError, match="backdoor.target=10 is none of the 10 classes"):
        Backdoor(target=10).wanted(torch.zeros(2, 1, 3, 4), torch.zeros(2, dtype=torch.int64), 10)


def test_those_who_poison_data_send_what_came_of_it_or_its_mean_or_make_the_mean_theirs() -> None:
    own = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]])
    known = Knowledge(own=own)
    assert LabelFlip()(H, 2, streams(2), known) is own and Backdoor()(H, 2, streams(2), known) is own
    pooled = LabelFlip(pooled=True)(H, 2, streams(2), known)
    assert pooled is not None and pooled.tolist() == [[2.0, 1.0, 0.0]] * 2
    replaced = ModelReplacement()(H, 2, streams(2), known)
    assert replaced is not None
    assert torch.allclose(torch.cat([H, replaced]).mean(0), own.mean(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InnerProduct(tau=float("inf")), "foe.tau"),
        (lambda: Gaussian(std=-1.0), "gaussian.std"),
        (lambda: Mimic(target=-1), "mimic.target"),
        (lambda: LabelFlip(share=0.0), "label_flip.share must be"),
        (lambda: ModelReplacement(share=1.5), "model_replacement.share must be"),
        (lambda: Backdoor(size=0), "backdoor: .*size=0"),
        (lambda: Mimic(warmup=0), "mimic.warmup"),
        (lambda: sent(Mimic(target=3)), "mimic.target=3 is not one of the 3 honest"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
