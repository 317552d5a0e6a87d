"""What ends a run: bounds on any metric, reached from the side on which it is good, and patience."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from fedsim.compose.root import read_file
from fedsim.config import ConfigError
from fedsim.metrics import small_is_good
from fedsim.stop import Course, Patience, Stop


@pytest.mark.parametrize(
    ("bounds", "row", "reason"),
    [
        ({}, {"test_accuracy": 1.0}, None),
        ({"test_accuracy": 0.9}, {}, None),
        ({"test_accuracy": 0.9}, {"test_accuracy": 0.899}, None),
        ({"test_accuracy": 0.9}, {"test_accuracy": 0.9}, "test_accuracy 0.9 reached 0.9"),
        ({"distance": 1e-3}, {"distance": 2e-3}, None),
        ({"distance": 1e-3}, {"distance": 5e-4}, "distance 0.0005 reached 0.001"),
        ({"test_loss": 0.5}, {"test_loss": nan}, None),
        ({"bits_up": 1e9}, {"bits_up": 2_000_000_000}, "bits_up 2e+09 reached 1e+09"),
        ({"virtual_seconds": 5, "bits_up": 1}, {"virtual_seconds": 6.0, "bits_up": 2}, "virtual_seconds 6 reached 5"),
        ({"test_mae": 0.3}, {"test_mae": 0.31}, None),
        ({"test_mae": 0.3}, {"test_mae": 0.3}, "test_mae 0.3 reached 0.3"),
        ({"own_score": 7}, {"own_score": 8}, "own_score 8 reached 7"),
        ({"own_score": 7}, {"own_score": inf}, None),
        ({"x": 1}, {"x": [1.0, 2.0]}, None),
    ],
)
def test_a_bound_stops_when_it_is_reached(bounds: dict[str, float], row: dict[str, Any], reason: str | None) -> None:
    assert Course(Stop(bounds)).take(row) == reason


def test_the_side_on_which_a_metric_is_good_goes_by_its_name() -> None:
    small = "train_loss test_loss distance test_mae test_rmse perplexity client_loss_mean error_rate "
    small += "brier test_crps kl_divergence wer"
    large = "test_accuracy personal_accuracy num_clients mirror_score maestro answered wall_seconds bits_up"
    assert all(map(small_is_good, small.split()))
    assert not any(map(small_is_good, large.split()))


def after(values: list[float | None], rounds: int, metric: str = "test_accuracy") -> int | None:
    """The round in which patience ends a run with these values, a round each; None if it does not."""
    course = Course(Stop(patience=Patience(metric=metric, rounds=rounds)))
    for number, value in enumerate(values, start=1):
        if course.take({"round": number} | ({} if value is None else {metric: value})):
            return number
    return None


def test_patience_counts_rounds_since_the_best_and_looks_only_where_there_is_a_value() -> None:
    assert after([0.5, 0.6, 0.6, 0.5, 0.5], 3) == 5  # as good is not better
    assert after([0.5, 0.6, 0.6, 0.7, 0.5], 3) is None
    assert after([0.5, None, None, None, None, 0.4], 3) == 6
    assert after([3.0, 2.0, 2.5, 2.5], 2, "test_loss") == 4
    assert after([1.0, 2.0, 3.0], 2, "test_loss") == 3
    assert after([nan, nan, 0.5, nan, nan], 2) == 5
    assert after([0.5, inf, nan], 2) == 3  # no best: a file of rows cannot tell it from the others


def test_a_course_may_be_taken_up_from_its_rows() -> None:
    stop = Stop(patience=Patience(metric="test_loss", rounds=2))
    rows = [{"round": k + 1, "test_loss": loss} for k, loss in enumerate([1.0, 0.5, 0.7, 0.7])]
    assert Course(stop, rows[:3]).ended is None and Course(stop, rows[:3]).take(rows[3]) == Course(stop, rows).ended
    assert "best in round 2 (0.5), 2 rounds ago" in str(Course(stop, rows).ended)


@pytest.mark.parametrize(("first", "last", "exploded"), [(2.3, 24.0, True), (2.3, 22.0, False), (0.0, 9.0, False)])
def test_a_loss_has_exploded_at_ten_times_its_start(first: float, last: float, exploded: bool) -> None:
    rows = [{"round": 1, "train_loss": first}, {"round": 2, "train_loss": 1e9}, {"round": 3, "train_loss": last}]
    assert (Course(Stop(), rows).exploded() is not None) == exploded


def stop_of(section: Any) -> Stop:
    found = read_file({"stop": section})[0].stop
    assert isinstance(found, Stop)
    return found


def test_a_file_may_bound_any_metric_and_say_how_patient_it_is() -> None:
    found = stop_of({"test_mae": 1, "bits_up": None, "patience": {"metric": "test_mae", "rounds": 20}})
    assert found == Stop({"test_mae": 1.0}, Patience(metric="test_mae", rounds=20))
    resolved = read_file({"stop": {"test_mae": 0.3, "patience": {"metric": "test_mae", "rounds": 2}}})[1]["stop"]
    assert resolved == {"test_mae": 0.3, "patience": {"metric": "test_mae", "rounds": 2}}
    assert stop_of(resolved) == Stop({"test_mae": 0.3}, Patience(metric="test_mae", rounds=2))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (0.9, r"stop: expected a section such as \{test_accuracy: 0.9\}, got 0.9"),
        ({"test_accuracy": "high"}, r"stop.test_accuracy: expected a number, got 'high'"),
        ({"test_loss": inf}, "stop: test_loss must be finite, got inf"),
        ({"personal_accuracy": 90}, r"stop: personal_accuracy is a share and must lie in \[0, 1\], got 90"),
        ({"patience": 5}, r"stop.patience: expected a section"),
        ({"patience": {"metric": "test_loss"}}, r"stop.patience.rounds: missing"),
        ({"patience": {"metric": "test_loss", "rounds": 0}}, r"stop.patience: rounds must be at least 1, got 0"),
    ],
)
def test_a_section_that_makes_no_sense_is_one_message(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stop_of(section)
