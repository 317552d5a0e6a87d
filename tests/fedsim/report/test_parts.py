import json
import re

import numpy as np
import pytest

from fedsim.history import History
from fedsim.report import clients
from fedsim.report.curves import over_each_axis, wants_log
from fedsim.report.draw import MAX_POINTS, Curve, heat_map, histogram, line_panel, thin, timeline
from fedsim.report.files import read_columns
from fedsim.report.page import shortened
from fedsim.report.shapes import tick_text
from fedsim.report.split import class_entropy, split_section
from fedsim.report.timing import absence_section, timing_section


def test_thinning_keeps_the_ends_and_every_spike():
    x = np.arange(100_000.0)
    y = np.sin(x / 1000)
    y[[777, 54_321]] = 50, -50
    keep = thin(x, y)
    assert len(keep) <= MAX_POINTS + 2 and keep[0] == 0 and keep[-1] == len(x) - 1
    assert {777, 54_321} <= set(keep.tolist()) and (np.diff(keep) > 0).all()


def test_thinning_keeps_a_gap_a_gap():
    x, y = np.arange(10_000.0), np.ones(10_000)
    y[4_000:6_000] = np.nan
    assert np.isnan(y[thin(x, y)]).any()


def test_a_short_curve_is_drawn_point_by_point():
    assert thin(np.arange(5.0), np.ones(5)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("y", [[0.5], [0.5, 0.5], [0.0, 0.0], [1e-9, 1e9], [np.nan, 0.25], [-1.0, 1.0]])
def test_any_curve_can_be_drawn(y, log):
    curve = Curve(x=np.arange(1.0, len(y) + 1), y=np.array(y))
    svg = line_panel([curve], x_label="round", alt='a "picture" <here>', log=log)
    assert svg.startswith('<svg class="picture" viewBox="0 0 340 220" role="img"')
    assert 'aria-label="a &quot;picture&quot; &lt;here&gt;"' in svg
    assert "nan" not in svg.lower()


def panel(y, x=None, **kind):
    """(texts, paths) of a panel of one curve."""
    svg = line_panel(
        [Curve(x=np.arange(len(y)) if x is None else np.array(x), y=np.array(y))], x_label="", alt="", **kind
    )
    return re.findall(r">([^<]+)</text>", svg), re.findall(r' d="([^"]+)" fill="none"', svg)


def test_a_curve_lies_where_its_axes_say():
    _, [path] = panel(
        [0.0, 10.0, 5.0], x=[0.0, 50.0, 100.0]
    )  # y from -0.5 to 10.5 over 170 px, x from 0 to 105 over 278
    assert path == "M48.0 172.3L180.4 17.7L312.8 95.0"
    _, [path] = panel([1.0, 100.0], x=[10.0, 1000.0], log=True, log_x=True)  # a twentieth of two decades beyond
    assert path == "M60.6 172.3L313.4 17.7"


def test_a_value_that_is_not_finite_or_has_no_logarithm_leaves_a_gap():
    assert panel([1.0, np.nan, 2.0, 3.0])[1][0].count("M") == 2
    assert panel([1.0, 0.0, 2.0, np.inf], log=True)[1][0].count("M") == 2
    assert panel([1.0, 2.0, 3.0], x=[0.0, 1.0, 2.0], log_x=True)[1][0].count("L") == 1


@pytest.mark.parametrize(
    ("y", "kind", "shown"),
    [
        ([0.0, 1.0], {}, ["0", "0.25", "0.5", "0.75", "1"]),
        ([-1.0, 1.0], {}, ["−1", "−0.5", "0", "0.5", "1"]),
        ([0.0, 3e6], {}, ["0", "1M", "2M", "3M"]),
        ([0.5, 0.52], {"percent": True}, ["50 %", "50.5 %", "51 %", "51.5 %", "52 %"]),
        ([1e-6, 1.0], {"log": True}, ["10⁻⁶", "10⁻⁴", "0.01", "1"]),
        ([2.0, 9.0], {"log": True}, ["2", "5"]),
        ([2.1, 2.9], {"log": True}, ["2.2", "2.4", "2.6", "2.8"]),
    ],
)
def test_axes_are_named_at_round_values(y, kind, shown):
    texts, _ = panel(y, **kind)
    assert texts[: len(shown)] == shown and texts[len(shown)] == "0"  # where the other axis begins


def test_accuracies_are_shown_in_percent_between_0_and_100():
    curve = Curve(x=np.arange(3.0), y=np.array([0.0, 1.0, 1.0]), low=np.zeros(3) - 0.2, high=np.ones(3) + 0.2)
    ticks = re.findall(r">([\d.]+) %<", line_panel([curve], x_label="round", alt="", percent=True))
    assert ticks and all(0 <= float(t) <= 100 for t in ticks)


def test_a_histogram_of_equal_values_has_one_bar():
    assert "<path" in histogram(np.full(7, 3), x_label="examples", alt="", whole=True)
    assert "<path" in histogram(np.full(7, 0.0), x_label="bit", alt="")
    assert "100 %" in histogram(np.ones(7), x_label="accuracy", alt="", percent=True)


def test_bars_stand_on_their_bins_with_a_line_at_the_median():
    svg = histogram(np.array([1, 1, 2]), x_label="examples", alt="", whole=True)
    # bins from 0.5 to 2.5 and a twentieth beyond over 278 px, up to 2.1 clients over 170
    assert ' d="M60.6 180V18.1H187.0V99.0H313.4V180Z"' in svg and ' d="M123.8 180V10"' in svg


def test_a_cells_shade_is_the_root_of_its_share_of_the_largest():
    svg = heat_map(np.array([[4, 0], [1, 4]]), rows=["a", "<b>"], x_label="client", y_label="", alt="", ids=True)
    cells = dict(re.findall(r' d="([^"]+)" stroke-opacity="([^"]+)"', svg))  # client across, class down
    assert cells == {"M0 0h1M1 1h1": "1", "M1 0h1": "0.56"} and "&lt;b&gt;" in svg


def test_a_job_is_a_bar_from_its_start_to_its_finish():
    svg = timeline([[(0, 1), (1, 3)], [(0, 2)]], np.array([2.0]), end=4, x_label="", alt="")
    paths = re.findall(r' d="([^"]+)"', svg)  # 165 px a second from 28 on, and rows 27.3 px apart
    assert paths[:3] == ["M358.0 74V14", "M28.0 30.4H193.0M28.0 57.6H358.0", "M193.0 30.4H523.0"]


def test_logarithmic_ticks_are_powers():
    assert [tick_text(v, log=True) for v in (1e-6, 2e-5, 0.01, 1, 100, 1e5)] == [
        "10⁻⁶",
        "2·10⁻⁵",
        "0.01",
        "1",
        "100",
        "10⁵",
    ]


def test_an_axis_that_does_not_move_has_no_panel():
    rows = [{"round": r, "virtual_seconds": 0.0, "bits_up": 8 * r, "loss": 1 / r} for r in range(1, 5)]
    assert [p.title for p in over_each_axis([([History(rows)], "loss")])] == ["By round", "By bits sent"]
    assert over_each_axis([([History(rows)], "nothing")]) == []


def test_a_cliff_is_drawn_on_a_logarithmic_axis():
    assert wants_log([np.array([1e6, 1.0, np.inf])])
    assert not wants_log([np.array([2.0, 0.1])]) and not wants_log([np.array([1e6, 0.0])]) and not wants_log([])


def test_class_entropy_by_hand():
    counts = np.array([[8, 0, 0, 0], [2, 2, 2, 2], [1, 1, 0, 0], [2, 1, 1, 0]])
    np.testing.assert_allclose(class_entropy(counts), [0, 2, 1, 1.5])


def test_the_split_is_told_in_a_sentence(tmp_path):
    np.savez(tmp_path / "split.npz", counts=np.array([[4, 0], [1, 1], [0, 0]]))
    section = split_section(tmp_path)
    assert section.text.startswith(
        "3 clients, 6 examples, 2 classes. The median client holds 2 (0 to 4) of 2 classes. 1 holds none."
    )
    assert [p.title for p in section.pictures][1:] == ["Clients by size", "Clients by mix of classes"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 10), (3, 1), (200, 100), (201, 101), (2, 1000)])
def test_a_split_of_any_shape_is_drawn(tmp_path, shape):
    np.savez(tmp_path / "split.npz", counts=np.ones(shape, dtype=int))
    assert split_section(tmp_path).pictures[0].wide


def test_no_client_or_no_example_is_no_picture_and_no_crash(tmp_path):
    np.savez(tmp_path / "split.npz", counts=np.zeros((0, 10), dtype=int))
    assert split_section(tmp_path) is None
    np.savez(tmp_path / "split.npz", counts=np.zeros((3, 10), dtype=int))
    assert "3 hold none" in split_section(tmp_path).text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"counts": np.ones(3)}, r"got \(3,\)"),
        ({"counts": -np.ones((2, 2))}, "not negative"),
        ({"counts": np.ones((2, 2)), "class_names": np.array(["a"])}, "1 class_names for 2 classes"),
        ({"other": np.ones(3)}, "cannot be read"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "split.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        split_section(tmp_path)


def test_columns_are_those_asked_for_with_nan_for_null(tmp_path):
    rows = [{"client": 0, "accuracy": 0.5}, {"client": 1, "accuracy": None, "nonfinite": ["accuracy"]}]
    (tmp_path / "clients.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    columns = read_columns(tmp_path, "clients", ["accuracy", "client", "nothing"])
    assert set(columns) == {"accuracy", "client"}
    np.testing.assert_equal(columns["accuracy"], [0.5, np.nan])
    assert read_columns(tmp_path, "timeline", ["client"]) == {}


def test_a_timeline_of_many_jobs_ends_where_all_rows_are_still_full(tmp_path):
    history = History([{"round": r, "virtual_seconds": 1.0 * r, "staleness_mean": 1.0} for r in range(1, 100)])
    jobs = [{"client": c, "start": 2.0 * k, "finish": 2.0 * k + 2} for k in range(1000) for c in range(100)]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(j) + "\n" for j in jobs))
    section = timing_section(history, tmp_path)
    assert "the first 240 jobs of 24 of 100 clients" in section.text and section.pictures[0].wide
    assert [p.title for p in section.pictures] == ["Who worked when", "Staleness by round"]


def test_staleness_without_a_timeline_is_one_panel(tmp_path):
    history = History([{"round": 1, "staleness_mean": 1.0}])
    assert [p.title for p in timing_section(history, tmp_path).pictures] == ["Staleness by round"]
    assert timing_section(History([{"round": 1}]), tmp_path) is None


def test_long_text_is_cut_and_says_by_how_much():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcdef", 4) == "abcd\n… 2 more letters"


def test_a_run_in_which_clients_could_be_missing_says_who_was():
    rows = [
        {"round": 1, "num_clients": 3, "num_away": 2.0, "num_dropped": 1},
        {"round": 2, "num_clients": 0, "num_away": 4.0, "num_dropped": 3, "too_few": 1},
    ]
    section = absence_section(History(rows))
    assert "3 replied, 4 dropped out. " in section.text and "which changed nothing: 1." in section.text
    assert [key.text for key in section.keys] == ["replied", "off line", "dropped out"]
    assert [picture.title for picture in section.pictures] == ["Jobs by round", "Clients off line by round"]
    lost = absence_section(History([{"round": 1, "num_clients": 3, "num_dropped": 1}]))
    assert lost is not None and lost.text == "Jobs of all rounds: 3 replied, 1 dropped out."  # nothing of off line
    assert absence_section(History([{"round": 1, "num_clients": 3}])) is None


def test_the_band_of_a_metric_that_may_be_negative_lies_around_its_mean(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(clients, "line_panel", lambda curves, **_: drawn.append(curves[0]) or "")
    row = {"round": 1, "test_gain": -1.0, "client_gain_mean": -1.0, "client_gain_std": 0.5, "client_loss_mean": 1.0}
    clients.spread_section(History([row | {"client_loss_std": 2.0}]), tmp_path)
    assert [(c.low.tolist(), c.high.tolist()) for c in drawn] == [([-1.5], [-0.5]), ([0.0], [3.0])]
