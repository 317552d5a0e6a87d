import math

import numpy as np
import pytest

from fedsim.history import History, axis_scale, show

ROWS = [
    {"round": 1, "virtual_seconds": 2.0, "bits_up": 4e6, "train_loss": 2.0},
    {"round": 2, "virtual_seconds": 5.0, "bits_up": 8e6, "train_loss": 1.5, "test_accuracy": 0.5, "x": [1.0, 2.0]},
    {"round": 3, "virtual_seconds": 6.0, "bits_up": 12e6, "train_loss": 1.25},
    {"round": 4, "virtual_seconds": 9.0, "bits_up": 16e6, "train_loss": 1.0, "test_accuracy": 0.75, "x": [0.0, 1.0]},
]


@pytest.fixture
def history():
    return History(ROWS, {"strategy": {"name": "fedavg"}})


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_a_series_holds_the_rounds_that_have_the_key(history):
    rounds, values = history.series("test_accuracy")
    assert rounds.tolist() == [2, 4] and values.tolist() == [0.5, 0.75]
    assert history.series("x")[1].shape == (2, 2)
    assert history.series("nothing")[0].size == 0


def test_the_last_value_is_that_of_the_last_evaluation(history):
    assert history.last("test_accuracy") == 0.75
    assert History([*ROWS, {"round": 5}]).last("test_accuracy") == 0.75
    with pytest.raises(KeyError, match="no row has 'accuracy'; there are round, virtual_seconds"):
        history.last("accuracy")


def test_a_data_frame_is_indexed_by_round(history):
    frame = history.to_pandas()
    assert frame.index.tolist() == [1, 2, 3, 4]
    assert frame["train_loss"].tolist() == [2.0, 1.5, 1.25, 1.0]
    assert frame["test_accuracy"].isna().tolist() == [True, False, True, False]
    assert len(History([]).to_pandas()) == 0


def test_a_plot_pairs_the_two_keys_and_names_the_unit(history, axes):
    assert history.plot(x="bits_up", ax=axes) is axes
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xdata(), [8, 16])
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.75])
    assert axes.get_xlabel() == "sent by clients (Mbit)" and axes.get_ylabel() == "test accuracy"


def test_a_plot_makes_its_own_axes_where_none_are_given(history, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "subplots", lambda: (None, plt.Figure().subplots()))
    assert history.plot(y="train_loss", x="virtual_seconds").get_xlabel() == "virtual time (s)"


def test_plotting_what_is_not_there_says_what_is(history):
    with pytest.raises(KeyError, match="no row has both 'round' and 'test_acc'"):
        history.plot(y="test_acc")


def test_a_folder_reads_back_with_its_configuration(tmp_path, history):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "test_loss": null, "nonfinite": ["test_loss"]}\n')
    (tmp_path / "config.yaml").write_text("seed: 3\nlocal:\n  optimizer: {name: sgd, lr: 1e-3}\nnote: ${oc.env:HOME}\n")
    loaded = History.load(tmp_path)
    assert loaded.config["local"]["optimizer"]["lr"] == 0.001
    assert loaded.config["note"] == "${oc.env:HOME}"
    assert math.isnan(loaded.last("test_loss"))
    assert loaded.name == tmp_path.name and len(loaded) == 1


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        History.load(tmp_path / "nowhere")


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n')
    (tmp_path / "config.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match="config.yaml: not readable: .*; restore the file or start anew"):
        History.load(tmp_path)


def test_it_shows_its_results_in_a_notebook_and_escapes_names():
    history = History(ROWS, {"strategy": {"name": "<b>"}})
    assert repr(history).startswith("History(<b>: test accuracy 75.0 %; training loss 1; rounds 4; ")
    assert "&lt;b&gt;" in history._repr_html_() and "75.0 %" in history._repr_html_()
    assert repr(History([])) == "History(run: no rows)"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("test_accuracy", 1.0, "100.0 %"),
        ("bits_down", 0.0, "0 bit"),
        ("bits_up", 999.0, "999 bit"),
        ("bits_up", 3.2e15, "3,200 Tbit"),
        ("virtual_seconds", 0.25, "0.25 s"),
        ("round", 12000.0, "12,000"),
        ("distance", 1.234e-9, "1.23e-09"),
        ("test_loss", math.nan, "not finite"),
    ],
)
def test_values_are_shown_with_their_units(key, value, text):
    assert show(key, value) == text


def test_axes_choose_the_prefix_of_the_largest_value():
    assert axis_scale("bits_up", 5e5) == (1e3, "sent by clients (kbit)")
    assert axis_scale("bits_down", 0.0) == (1.0, "sent to clients (bit)")
    assert axis_scale("staleness_mean", 3.0) == (1.0, "staleness mean")
