import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.config import ConfigError
from fedsim.metrics import Metrics, check_names, spread


def test_counts_sum_beside_means():
    loss = Metrics.mean_over(torch.tensor([1.0, 5.0]), torch.tensor([3, 1]), name="loss")
    assert (Metrics.count(num_clients=4) + loss + Metrics.count(num_clients=3)).values() == {
        "loss": 2.0,
        "num_clients": 7,
    }


def test_a_client_without_samples_adds_nothing_even_if_its_loss_is_nan():
    losses, weights = torch.tensor([2.0, float("nan"), 5.0]), torch.tensor([1, 0, 2])
    assert Metrics.mean_over(losses, weights, name="train_loss").values() == {"train_loss": 4.0}


def test_a_client_with_samples_and_a_nan_loss_is_not_hidden():
    values = Metrics.mean_over(torch.tensor([float("nan"), 1.0]), torch.ones(2), name="loss").values()
    assert math.isnan(values["loss"])


def test_a_mean_over_nothing_is_left_out():
    assert Metrics.mean_over(torch.zeros(0), torch.zeros(0), name="loss").values() == {}


@pytest.mark.parametrize("name", ["test_mae", "personal_f1_std", "global_perplexity", "client_mae_p10", "bits_up"])
def test_names_that_an_evaluation_gives_are_nobody_elses(name):
    check_names(["tested", "globally", "clients_drift"], "Mine")
    with pytest.raises(ConfigError, match=f"Mine: metric '{name}' is reserved"):
        check_names(["drift", name], "Mine")


@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(0, 50)), min_size=1, max_size=30), st.data())
def test_any_cut_into_stacks_gives_the_same_mean(pairs, data):
    values = torch.tensor([float(v) for v, _ in pairs])
    weights = torch.tensor([float(w) for _, w in pairs])
    cut = data.draw(st.integers(0, len(pairs)))
    whole = Metrics.mean_over(values, weights, name="m")
    parts = Metrics.mean_over(values[:cut], weights[:cut], name="m") + Metrics.mean_over(
        values[cut:], weights[cut:], name="m"
    )
    assert parts == whole  # whole numbers: float64 sums are exact


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_impossible_weight_is_refused(weight):
    with pytest.raises(ValueError, match="weights of a metric"):
        Metrics.mean_over(torch.ones(1), torch.tensor([weight]), name="loss")


def test_spread_of_twenty_clients_by_hand():
    values = torch.arange(20, dtype=torch.float32)
    assert spread(values)["mean"] == 9.5
    assert spread(values)["std"] == pytest.approx(math.sqrt((20**2 - 1) / 12))
    assert spread(values)["worst_decile"] == 0.5  # the two lowest of twenty
    assert spread(values, higher_is_better=False)["worst_decile"] == 18.5


def test_spread_rounds_the_decile_up():
    assert spread(torch.arange(11, dtype=torch.float32))["worst_decile"] == 0.5  # ceil(11 / 10) = 2 clients


def test_spread_takes_nan_for_the_worst_and_none_for_nothing():
    values = torch.tensor([float("nan"), *[0.5] * 19])
    assert math.isnan(spread(values)["worst_decile"])
    assert math.isnan(spread(values, higher_is_better=False)["worst_decile"])
    assert spread(values[:0]) == {}
