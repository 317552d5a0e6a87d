import pandas
import pytest

from fedsim.report import compared
from tests.fedsim.report.folders import CONFIG, NASTY, curve, write_rows
from tests.fedsim.report.test_run import Page


@pytest.fixture
def runs(tmp_path):
    """Two seeds of fedavg that reach 0.6 and 0.8, and one scaffold that reaches 0.9 with twice the bits."""

    def run(name, strategy, seed, accuracies, **steps):
        return write_rows(tmp_path / name, curve(accuracies, **steps), CONFIG.format(seed=seed, strategy=strategy))

    return [
        run("fedavg-seed0", "fedavg", 0, [0.2, 0.4, 0.6, 0.5]),
        run("fedavg-seed1", "fedavg", 1, [0.3, 0.7, 0.8, 0.7], seconds=3.0),
        run("scaffold", "scaffold", 0, [0.5, 0.6, 0.9, 0.9], bits=2e6),
    ]


def test_costs_are_counted_to_the_best_common_accuracy(runs):
    fedavg, scaffold = compared(runs).rows
    assert fedavg["name"] == "fedavg" and fedavg["num_runs"] == 2 and fedavg["seeds"] == [0, 1]
    assert fedavg["target"] == scaffold["target"] == 0.6
    assert fedavg["rounds_to_target"] == 2.5  # rounds 3 and 2
    assert fedavg["virtual_seconds_to_target"] == 6.0  # 3 x 2 s and 2 x 3 s
    assert fedavg["bits_up_to_target"] == 2.5e6
    assert scaffold["rounds_to_target"] == 2 and scaffold["bits_up_to_target"] == 4e6
    assert fedavg["final"] == pytest.approx(0.6) and fedavg["final_std"] == pytest.approx(0.2 / 2**0.5)
    assert fedavg["best"] == pytest.approx(0.7)
    assert scaffold["final"] == 0.9 and scaffold["final_std"] is None
    assert scaffold["differs"] == {"strategy.name": "scaffold"}


def test_runs_are_grouped_by_what_can_change_their_metrics(runs, tmp_path):
    config = CONFIG.format(seed=2, strategy="fedavg").replace("[jsonl]", "[jsonl, wandb]").replace("2.13.0", "2.12.0")
    third = write_rows(tmp_path / "fedavg-seed2", curve([0.6]), config + "runtime: {workers: 2}\n")
    bigger = write_rows(tmp_path / "other", curve([0.6]), config.replace("cohort_size: 10", "cohort_size: 50"))
    table = compared([*runs, third, bigger]).rows
    assert [row["num_runs"] for row in table] == [3, 1, 1]
    assert table[2]["differs"] == {"strategy.name": "fedavg", "strategy.cohort_size": "50"}


def test_runs_without_a_configuration_stay_apart(tmp_path):
    runs = [write_rows(tmp_path / name, curve([0.5])) for name in ("a", "b")]
    assert [row["name"] for row in compared(runs).rows] == ["a", "b"]


def test_the_same_folder_counts_once_and_equal_names_are_told_apart(tmp_path):
    runs = [write_rows(tmp_path / parent / "run", curve([0.5])) for parent in ("a", "b")]
    assert [row["name"] for row in compared([*runs, runs[0]]).rows] == ["a/run", "b/run"]


def test_seeds_of_a_sweep_are_named_by_what_they_share(tmp_path):
    def run(lr, seed):
        config = CONFIG.format(seed=seed, strategy="fedavg") + f"lr: {lr}\n"
        return write_rows(tmp_path / f"seed={seed},lr={lr}", curve([0.5]), config)

    table = compared([run(lr, seed) for seed in (0, 1) for lr in (0.1, 0.2)]).rows
    assert [(row["name"], row["num_runs"]) for row in table] == [("lr=0.1", 2), ("lr=0.2", 2)]


def test_a_null_differs_in_nothing_from_a_key_that_is_not_there(tmp_path):
    config = CONFIG.format(seed=0, strategy="fedavg")
    runs = [
        write_rows(tmp_path / str(k), curve([0.5]), config + more) for k, more in enumerate(["a: 1\nb: null\n", ""])
    ]
    assert [row["differs"] for row in compared(runs).rows] == [{"a": "1"}, {}]


def test_min_max_runs_are_compared_by_distance(tmp_path):
    rows = [{"round": r, "bits_up": 10 * r, "distance": 2.0**-r} for r in range(1, 6)]
    slow = write_rows(tmp_path / "slow", [{**row, "distance": row["distance"] * 4} for row in rows])
    fast = write_rows(tmp_path / "fast", rows)
    table = {row["name"]: row for row in compared([slow, fast]).rows}
    assert table["fast"]["measure"] == "distance" and table["fast"]["target"] == 2.0**-3
    assert table["fast"]["rounds_to_target"] == 3 and table["slow"]["rounds_to_target"] == 5
    assert table["fast"]["virtual_seconds_to_target"] is None


def test_a_run_that_never_was_finite_has_no_numbers_and_spoils_no_target(tmp_path):
    bad = write_rows(tmp_path / "bad", [{"round": 1, "test_accuracy": None, "nonfinite": ["test_accuracy"]}])
    good = write_rows(tmp_path / "good", curve([0.5, 0.7]))
    table = {row["name"]: row for row in compared([bad, good]).rows}
    assert table["bad"]["final"] is None and table["bad"]["rounds_to_target"] is None
    assert table["good"]["target"] == 0.7
    Page(compared([bad, good]).write(tmp_path / "c.html").read_text())


def test_runs_with_nothing_in_common_are_refused(tmp_path):
    a = write_rows(tmp_path / "a", [{"round": 1, "distance": 1.0}])
    b = write_rows(tmp_path / "b", [{"round": 1, "test_accuracy": 1.0}])
    with pytest.raises(ValueError, match="common to all runs"):
        compared([a, b])
    with pytest.raises(ValueError, match="look at c"):
        compared([a, write_rows(tmp_path / "c", [{"round": 1}])])
    with pytest.raises(ValueError, match="nothing to compare"):
        compared([])


def test_the_page_overlays_the_curves_and_loads_nothing(runs, tmp_path):
    path = compared(runs).write(tmp_path / "out")
    assert path == tmp_path / "out" / "comparison.html"
    html = path.read_text()
    page = Page(html)
    assert page.headings == ["Result", "Test accuracy", "Test loss", "Train loss"]
    assert page.figures == ["By round", "By virtual time", "By bits sent"] * 3
    assert "Target: 60.0 %" in html and "standard deviation over seeds" in html and "strategy.name=scaffold" in html
    assert page.addresses == []


def test_a_page_of_one_run_and_of_many_can_be_written(tmp_path):
    runs = [write_rows(tmp_path / f"r{i}", curve([0.5, 0.6], bits=10.0**i)) for i in range(20)]
    for some in (runs[:1], runs):
        Page(compared(some).write(tmp_path / "c.html").read_text())
    assert "logarithmic" in (tmp_path / "c.html").read_text()


def test_names_of_the_user_are_escaped(tmp_path):
    runs = [
        write_rows(tmp_path / f"{NASTY.replace('/', '|')}{i}", curve([0.5]), f"strategy: {{name: '{NASTY}{i}'}}\n")
        for i in range(2)
    ]
    assert "<script" not in compared(runs).write(tmp_path / "c.html").read_text()


def test_a_seed_that_is_there_twice_counts_once_and_the_longer_run_is_looked_at(runs, tmp_path):
    again = write_rows(tmp_path / "again", curve([0.2, 0.4]), CONFIG.format(seed=0, strategy="fedavg"))
    for order in ([again, *runs], [*runs, again]):
        with pytest.warns(UserWarning, match=r"again: same settings and seed as .*fedavg-seed0, so it does not count"):
            table = compared(order).rows
        assert [(row["num_runs"], row["final"]) for row in table] == [(2, pytest.approx(0.6)), (1, 0.9)]
    split = CONFIG.format(seed=0, strategy="fedavg").replace("alpha: 0.1", "alpha: 0.1, seed: 1")
    other = write_rows(tmp_path / "other", curve([0.6]), split)
    assert [row["num_runs"] for row in compared([runs[0], other]).rows] == [2]


def test_costs_are_counted_to_a_target_that_is_given(runs):
    fedavg, scaffold = compared(runs, target=0.8).rows
    assert scaffold["rounds_to_target"] == 3 and scaffold["bits_up_to_target"] == 6e6
    assert fedavg["rounds_to_target"] is None  # one of its seeds never came so far
    assert compared(runs, "test_loss", target=1.0).rows[0]["rounds_to_target"] == 2
    assert compared(runs, target=0.8).in_words() == "80.0 % test accuracy"


@pytest.mark.parametrize(
    ("metric", "target", "message"),
    [
        ("test_mae", None, "fedavg-seed0: no row has 'test_mae'; known: round, virtual_seconds"),
        (None, 80, r"the target of test_accuracy is a share and must lie in \[0, 1\], got 80"),
    ],
)
def test_a_metric_or_a_target_that_no_run_has_is_refused(runs, metric, target, message):
    with pytest.raises(ValueError, match=message):
        compared(runs, metric, target)


def test_a_comparison_is_a_table_for_other_programs_and_for_latex(runs, tmp_path):
    comparison = compared(runs)
    table = pandas.read_csv(comparison.write(tmp_path / "c.csv"), index_col="name")
    assert table.loc["fedavg", "seeds"] == "0 1" and table.loc["fedavg", "final"] == pytest.approx(0.6)
    assert table.loc["scaffold", "bits_up_to_target"] == 4e6 and table.loc["scaffold", "strategy.name"] == "scaffold"
    assert pandas.isna(table.loc["scaffold", "final_std"])
    lines = comparison.write(tmp_path / "c.tex").read_text().splitlines()
    assert lines[0].startswith(r"\begin{tabular}") and lines[-1] == r"\end{tabular}" and r"\toprule" in lines
    assert any(line.startswith(r"fedavg & 2 & 60.0 \% ± 14.1 \% &") for line in lines)
    with pytest.raises(ValueError, match=r"c.pdf: a comparison is written as .html, .csv, .tex"):
        comparison.write(tmp_path / "c.pdf")
