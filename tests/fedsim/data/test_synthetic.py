"""Drawn data sets have the distributions they claim."""

import numpy as np
import pytest
import torch

from fedsim.data.synthetic import blobs, synthetic


def test_blobs_have_the_asked_shape_sizes_and_spread():
    data = blobs(num_examples=4000, num_test=40, num_classes=4, shape=(2, 3), spread=0.5)
    assert data.inputs.shape == (4000, 2, 3) and data.test_inputs.shape == (40, 2, 3)
    assert data.targets.bincount().tolist() == [1000] * 4
    within = torch.stack([data.inputs[data.targets == k].std(0) for k in range(4)])
    assert (within - 0.5).abs().max() < 5 * 0.5 / np.sqrt(2 * 1000)


def test_the_seed_alone_decides_the_draw():
    assert torch.equal(blobs(seed=3).inputs, blobs(seed=3).inputs)
    assert not torch.equal(blobs(seed=3).inputs, blobs(seed=4).inputs)
    assert torch.equal(synthetic(seed=3).inputs, synthetic(seed=3).inputs)


def test_synthetic_clients_hold_out_their_last_tenth():
    data = synthetic(num_clients=20)
    assert data.groups is not None and data.group_names is not None and len(data.group_names) == 20
    sizes = data.groups.bincount()
    assert int(sizes.min()) >= 45  # nine tenths of 50
    everyone = len(data.inputs) + len(data.test_inputs)
    assert 0 <= len(data.test_inputs) - everyone / 10 <= 20  # rounded up client by client


def test_the_iid_form_has_one_model_and_the_published_covariance():
    data = synthetic(iid=True, num_clients=60, test_fraction=0)
    deviation = torch.arange(1, 61) ** -0.6
    error = deviation / np.sqrt(len(data.inputs))
    assert (data.inputs.mean(0).abs() < 5 * error).all()
    assert ((data.inputs.std(0) - deviation).abs() < 5 * error).all()
    # one linear model separates everything: least squares on one half predicts the other far above chance
    x = torch.cat([data.inputs, torch.ones(len(data.inputs), 1)], 1).double()
    y = torch.nn.functional.one_hot(data.targets, 10).double()
    shared = torch.linalg.lstsq(x[::2], y[::2]).solution
    assert ((x[1::2] @ shared).argmax(1) == data.targets[1::2]).double().mean() > 0.6


def test_beta_moves_the_clients_inputs_apart():
    def spread(beta: float) -> float:
        data = synthetic(beta=beta, num_clients=200, num_features=20)
        assert data.groups is not None
        means = torch.stack([data.inputs[data.groups == k].mean() for k in range(200)])
        return float(means.var())

    # a client's mean over d = 20 features has variance beta^2 + 1/20, and a little sampling noise
    assert spread(0.0) == pytest.approx(0.05, rel=0.5)
    assert spread(3.0) == pytest.approx(9.05, rel=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blobs(num_examples=0), "blobs: num_examples must be 1 or more, got 0"),
        (lambda: blobs(shape=()), "blobs: shape must be positive sizes"),
        (lambda: blobs(spread=float("nan")), "blobs: spread must be 0 or more"),
        (lambda: synthetic(alpha=-1), "synthetic: alpha must be 0 or more, got -1"),
        (lambda: synthetic(num_clients=0), "synthetic: num_clients must be 1 or more, got 0"),
        (lambda: synthetic(test_fraction=1), "synthetic: test_fraction"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
