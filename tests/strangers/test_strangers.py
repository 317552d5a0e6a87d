"""Programs that a stranger would write: they run, and what they train has learned something."""

from __future__ import annotations

import pytest

from tests.strangers import masked_tokens, multi_label_images, tabular_regression, two_inputs


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
