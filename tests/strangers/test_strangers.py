"""Programs that a stranger would write: they run, and what they train beats what needs no training of theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tests.strangers import (
    autoencoder,
    distillation,
    gaussian_process,
    graphs,
    masked_tokens,
    multi_label_images,
    packed_sequences,
    residual_batchnorm,
    tabular_regression,
    two_inputs,
)


def test_prices_are_predicted_in_towns_some_of_which_have_nothing_to_learn_from() -> None:
    last = tabular_regression.main().rows[-1]
    assert last["test_r2"] > 0.8 and last["test_mae"] < 0.3
    assert 0 < last["personal_mae"] < 0.3 and last["personal_mae_worst_decile"] > last["personal_mae"]


def test_bars_are_seen_in_pictures() -> None:
    rows = [row for row in multi_label_images.main().rows if "test_macro_f1" in row]
    assert rows[-1]["test_macro_f1"] > 0.9 and rows[-1]["test_exact_match"] > 0.6
    assert "client_exact_match_mean" in rows[-1] and "client_macro_f1_mean" not in rows[-1]


def test_words_that_were_left_out_are_filled_in() -> None:
    last = masked_tokens.main().rows[-1]
    assert last["test_token_accuracy"] > 0.5 and last["test_perplexity"] < 4


def test_a_model_with_two_inputs_and_hospitals_with_rows_of_their_own() -> None:
    last = two_inputs.main().rows[-1]
    assert last["test_label_accuracy"] > 0.8 and last["test_found"] > 0.4
    # one model for all: over the same rows clients' losses are the server's
    assert last["personal_loss"] == pytest.approx(last["test_loss"], rel=1e-6) and "personal_found_std" in last


@pytest.mark.filterwarnings("ignore:VAE cannot be batched")
def test_an_autoencoder_that_draws_its_code_sees_more_than_the_mean() -> None:
    x = autoencoder.strokes().test_inputs
    assert isinstance(x, torch.Tensor)
    assert autoencoder.main().last("test_reconstruction_error") < 0.3 * float(x.var(0).mean())


def test_packed_sequences_are_read_to_their_ends_and_no_further() -> None:
    answers = packed_sequences.sentences()[1]
    assert packed_sequences.main().last("test_accuracy") > max(answers.mean(), 1 - answers.mean()) + 0.3


def test_messages_are_scattered_along_the_edges_of_graphs() -> None:
    answers = graphs.graphs().test_targets
    assert isinstance(answers, torch.Tensor)
    share = float(answers.double().mean())
    assert graphs.main().last("test_accuracy") > max(share, 1 - share) + 0.2


def test_a_residual_network_with_batchnorm_reads_digits_better_than_their_means_do() -> None:
    x, y = load_digits(return_X_y=True)
    means = np.stack([x[y == k].mean(0) for k in range(10)])
    by_means = (np.square(x[:, None] - means).sum(-1).argmin(1) == y).mean()
    history = residual_batchnorm.main()
    assert history.last("test_accuracy") > by_means
    assert float(history.model.get_submodule("blocks.0.bn1").running_mean.abs().max()) > 0  # type: ignore[union-attr, operator]


def test_a_student_of_bad_labels_does_better_than_a_line_through_good_ones() -> None:
    x, y = distillation.moons()
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    line = torch.linalg.lstsq(ones[:400], 2.0 * y[:400] - 1).solution
    by_line = float((((ones @ line) > 0) == (y > 0))[400:].double().mean())
    history = distillation.main()
    assert history.last("test_right") > by_line + 0.05
    taught, before = history.model.get_submodule("teacher"), distillation.teacher()
    assert all(torch.equal(a, b) for a, b in zip(taught.parameters(), before.parameters(), strict=True))


def test_a_gaussian_process_of_all_stations_sees_more_than_a_line() -> None:
    x, y, _ = gaussian_process.stations()
    line = np.polynomial.Polynomial.fit(x[:, 0], y, 1)
    assert gaussian_process.main().last("test_squared_error") < 0.3 * np.square(line(x[:, 0]) - y).mean()
