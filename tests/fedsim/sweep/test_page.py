"""The page of a sweep: best settings, curves with bands, the target along the axes, and what went wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.sweep.page import write_page
from fedsim.sweep.results import Record, Results
from fedsim.sweep.space import Choice, Method, Setting
from fedsim.sweep.trials import Ended, Trial
from tests.fedsim.report.folders import CONFIG, curve, write_rows
from tests.fedsim.report.test_run import Page

ACCURACY = "test_accuracy"


def trials(folder: Path, values: Mapping[str, Any], reached: Sequence[float], method: str = "") -> list[Record]:
    """A setting whose seeds reached these values."""
    setting, found = Setting(method, dict(values), {}), []
    for seed, value in enumerate(reached):
        run = folder / f"{setting.name},seed={seed}"
        rows = [{**row, "test_loss": value} for row in curve([0.1, value])]
        write_rows(run, rows, CONFIG.format(seed=seed, strategy="fedavg"))
        trial = Trial(setting, seed, {}, "x.yaml", run)
        found.append(Record(trial, Ended("done"), {ACCURACY: value, "test_loss": value}))
    return found


def failed(folder: Path, values: Mapping[str, Any], status: Any, why: str, method: str = "") -> Record:
    setting = Setting(method, dict(values), {})
    return Record(Trial(setting, 0, {}, "x.yaml", folder / setting.name), Ended(status, why), {})


def rates(folder: Path, method: str, values: dict[float, float]) -> list[Record]:
    """Two seeds of every rate."""
    settings = [({"m": method, "lr": rate, "kind": "<b>"}, accuracy) for rate, accuracy in values.items()]
    return [r for values, a in settings for r in trials(folder, values, [a, a + 0.01], method)]


def write(
    folder: Path, records: list[Record], target: str | None = ACCURACY, minimise: bool = False, **axes: Any
) -> str:
    names = dict.fromkeys(r.trial.setting.method for r in records)
    methods = [Method(name, {key: Choice(tuple(values)) for key, values in axes.items()}) for name in names]
    return write_page(Results(folder, methods, records, target, minimise, num_seeds=2)).read_text()


def texts_of(html: str) -> list[str]:
    """What is written in the picture of two keys."""
    picture = html[html.index("<svg", html.index("of two keys")) :]
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture[: picture.index("</svg>")])


def test_the_best_of_each_method_is_shown_with_its_curves_and_all_others_in_a_table(tmp_path: Path) -> None:
    reached = {0.001: 0.5, 0.1: 0.7, 1.0: 0.6}
    both = [*rates(tmp_path, "fedavg", reached), *rates(tmp_path, "scaffold", {k: v + 0.1 for k, v in reached.items()})]
    html = write(tmp_path, [*both, failed(tmp_path, {"lr": 9}, "diverged", "not <finite>", "fedavg")])
    page = Page(html)
    assert page.headings[:4] == ["Best settings", "Test accuracy along the axes", "Test accuracy", "Test loss"]
    assert page.headings[-2:] == ["All settings", "What did not come to its end"]
    assert page.figures[0] == "lr" and "kind" not in page.figures  # what is no number has no axis
    assert page.figures[1:4] == ["By round", "By virtual time", "By bits sent"]
    assert "70.5 % ± 0.7 %" in html and "80.5 % ± 0.7 %" in html and html.count("(best)") == 2
    assert "1 run did not come to its end; see below." in html
    assert "&lt;b&gt;" in html and "not &lt;finite&gt;" in html and "<finite>" not in html


def test_of_one_method_several_settings_are_drawn(tmp_path: Path) -> None:
    html = write(tmp_path, rates(tmp_path, "", {0.1 * k: 0.05 * k for k in range(1, 10)}))
    curves = html[html.index(">Test accuracy<") : html.index(">Test loss<")]
    assert curves.count("lr=0.") >= 6 and "lr=0.1," not in curves


def test_a_sweep_in_which_nothing_ended_has_a_page_that_says_so(tmp_path: Path) -> None:
    html = write(tmp_path, [failed(tmp_path, {"lr": 9}, "failed", "KeyError")], target=None)
    assert Page(html).headings == ["All settings", "What did not come to its end"]


def test_of_two_keys_every_pair_has_a_cell_and_rows_and_columns_their_worst(tmp_path: Path) -> None:
    rule = {"name": "trimmed_mean", "f": 2}

    def pair(attack: str, aggregator: Any) -> dict[str, Any]:
        return {"attack": attack, "strategy.aggregator": aggregator}

    records = [
        *trials(tmp_path, pair("alie", "mean"), [0.1, 0.3]),
        *trials(tmp_path, pair("alie", rule), [0.7, 0.5]),
        *trials(tmp_path, pair("foe", "mean"), [0.25, 0.35]),
        *trials(tmp_path, pair("foe", rule), [0.45, 0.55]),
        failed(tmp_path, pair("nan", "mean"), "diverged", "infinite"),
        *trials(tmp_path, pair("nan", rule), [0.7]),
    ]
    axes = {"attack": ["foe", "alie", "nan"], "strategy.aggregator": ["mean", rule], "lr": [0.1]}
    html = write(tmp_path, records, **axes)
    assert "attack by strategy.aggregator" in Page(html).figures
    texts = texts_of(html)
    assert texts[:24] == [
        *("30.0 %", "min 25.0 %", "50.0 %", "min 45.0 %", "30.0 %", "min 25.0 %"),
        *("20.0 %", "min 10.0 %", "60.0 %", "min 50.0 %", "20.0 %", "min 10.0 %"),
        *("–", "70.0 %", "not all ended", "–"),
        *("–", "–", "–"),  # the worst of a column with a run that did not end is not known
        *("foe", "alie", "nan", "worst", "mean"),
    ]
    assert texts[24:26] == ["trimmed_mean f=2", "worst"]


def test_of_losses_the_worst_is_the_greatest(tmp_path: Path) -> None:
    records = [
        record
        for more in (7, 0)  # of settings with the same pair the best counts
        for a in (1, 2)
        for b in (10, 20)
        for record in trials(tmp_path, {"a": a, "b": b, "c": more}, [a + b + more - 0.5, a + b + more + 0.5])
    ]
    texts = texts_of(write(tmp_path, records, target="test_loss", minimise=True, a=[1, 2], b=[10, 20]))
    assert [float(text) for text in texts[12:18:2]] == [12, 22, 22]
    assert [float(text.removeprefix("max ")) for text in texts[13:18:2]] == [12.5, 22.5, 22.5]
