"""The page of a sweep: best settings, curves with bands, the target along the axes, and what went wrong."""

from __future__ import annotations

import re
from pathlib import Path

from fedsim.report.sweep import SettingLine, SweepPage
from tests.fedsim.report.folders import CONFIG, curve, write_rows
from tests.fedsim.report.test_run import Page


def lines(folder: Path, method: str, values: dict[float, float]) -> list[SettingLine]:
    """A setting of two seeds for each rate, the best first."""
    found = []
    for rate, accuracy in sorted(values.items(), key=lambda item: -item[1]):
        runs = [
            write_rows(
                folder / f"{method}-{rate}-{seed}",
                curve([0.1, accuracy + 0.01 * seed]),
                CONFIG.format(seed=seed, strategy="fedavg"),
            )
            for seed in (0, 1)
        ]
        found.append(
            SettingLine(
                name=f"{method},lr={rate}",
                method=method,
                values={"lr": rate, "kind": "<b>"},
                folders=runs,
                value=accuracy + 0.005,
                deviation=0.01 / 2**0.5,
                best=not found,
            )
        )
    return found


def write(folder: Path, **more: object) -> str:
    given = {"title": "a sweep", "lines": [], "troubled": [], "target": "test_accuracy", "minimise": False, **more}
    return SweepPage(**given).write(folder / "report.html").read_text()  # type: ignore[arg-type]


def test_the_best_of_each_method_is_shown_with_its_curves_and_all_others_in_a_table(tmp_path: Path) -> None:
    rates = {0.001: 0.5, 0.1: 0.7, 1.0: 0.6}
    both = lines(tmp_path, "fedavg", rates) + lines(tmp_path, "scaffold", {k: v + 0.1 for k, v in rates.items()})
    html = write(tmp_path, lines=both, troubled=[("lr=9", "diverged", "not <finite>")])
    page = Page(html)
    assert page.headings[:4] == ["Best settings", "Test accuracy along the axes", "Test accuracy", "Test loss"]
    assert page.headings[-2:] == ["All settings", "What did not come to its end"]
    assert page.figures[0] == "lr" and "kind" not in page.figures  # what is no number has no axis
    assert page.figures[1:4] == ["By round", "By virtual time", "By bits sent"]
    assert "70.5 % ± 0.7 %" in html and "80.5 % ± 0.7 %" in html and html.count("(best)") == 2
    assert "1 run did not come to its end; see below." in html
    assert "&lt;b&gt;" in html and "not &lt;finite&gt;" in html and "<finite>" not in html


def test_of_one_method_several_settings_are_drawn(tmp_path: Path) -> None:
    html = write(tmp_path, lines=lines(tmp_path, "", {0.1 * k: 0.05 * k for k in range(1, 10)}))
    curves = html[html.index(">Test accuracy<") : html.index(">Test loss<")]
    assert curves.count("lr=0.") >= 6 and "lr=0.1<" not in curves


def test_a_sweep_in_which_nothing_ended_has_a_page_that_says_so(tmp_path: Path) -> None:
    line = SettingLine(name="lr=9", method="", values={"lr": 9}, folders=[], value=None, deviation=None, best=False)
    html = write(tmp_path, lines=[line], troubled=[("lr=9", "failed", "KeyError")], target=None)
    assert Page(html).headings == ["All settings", "What did not come to its end"]


def test_of_two_keys_every_pair_has_a_cell_and_rows_and_columns_their_worst(tmp_path: Path) -> None:
    rule = {"name": "trimmed_mean", "f": 2}
    cells = {  # (attack, rule): mean and least of the seeds
        ("alie", "mean"): (0.2, 0.1),
        ("alie", rule["name"]): (0.6, 0.5),
        ("foe", "mean"): (0.3, 0.25),
        ("foe", rule["name"]): (0.5, 0.45),
        ("nan", "mean"): (None, None),  # diverged
        ("nan", rule["name"]): (0.7, None),  # with one seed
    }
    found = [
        SettingLine(
            name=f"{attack},{name}",
            method="",
            values={"attack": attack, "strategy.aggregator": rule if name == rule["name"] else name},
            folders=[],
            value=value,
            deviation=None,
            worst=worst,
            best=False,
        )
        for (attack, name), (value, worst) in cells.items()
    ]
    axes = {"attack": ["foe", "alie", "nan"], "strategy.aggregator": ["mean", rule], "lr": [0.1]}
    html = write(tmp_path, lines=found, axes=axes)
    assert Page(html).figures == ["attack by strategy.aggregator"]
    picture = html[html.index("<svg", html.index("of two keys")) :]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture[: picture.index("</svg>")])
    assert texts[:24] == [
        *("30.0 %", "min 25.0 %", "50.0 %", "min 45.0 %", "30.0 %", "min 25.0 %"),
        *("20.0 %", "min 10.0 %", "60.0 %", "min 50.0 %", "20.0 %", "min 10.0 %"),
        *("–", "70.0 %", "not all ended", "–"),
        *("–", "–", "–"),  # the worst of a column with a run that did not end is not known
        *("foe", "alie", "nan", "worst", "mean"),
    ]
    assert texts[24:26] == ["trimmed_mean f=2", "worst"]


def test_of_losses_the_worst_is_the_greatest(tmp_path: Path) -> None:
    found = [
        SettingLine(
            name=f"{a}{b}",
            method="",
            values={"a": a, "b": b, "c": more},
            folders=[],
            value=a + b + more,
            deviation=None,
            worst=a + b + more + 0.5,
            best=False,
        )
        for more in (0, 7)  # of settings with the same pair the best, which comes first, counts
        for a in (1, 2)
        for b in (10, 20)
    ]
    html = write(tmp_path, lines=found, axes={"a": [1, 2], "b": [10, 20]}, target="test_loss", minimise=True)
    picture = html[html.index("<svg", html.index("of two keys")) :]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture[: picture.index("</svg>")])
    assert [float(text) for text in texts[12:18:2]] == [12, 22, 22]
    assert [float(text.removeprefix("max ")) for text in texts[13:18:2]] == [12.5, 22.5, 22.5]
