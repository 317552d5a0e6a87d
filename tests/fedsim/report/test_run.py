import re
from html.parser import HTMLParser

import numpy as np
import pytest

from fedsim.report import write_report
from fedsim.report.run import facts
from tests.fedsim.report.folders import CONFIG, NASTY, curve, full, write_rows

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Headings, ids, addresses and text of a page; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.figures: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "figcaption":
            self.figures.append(data)


def report(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of a run with everything."""
    return report(full(tmp_path_factory.mktemp("whole") / "run"))


def test_a_run_with_everything_shows_every_section(whole):
    html, page = whole
    assert page.headings == [
        "Test accuracy",
        "Loss",
        "Distance to the known solution",
        "Spread over clients",
        "How the data was split",
        "Asynchrony",
        "Spread of the honest clients",
        "Numbers",
        "Configuration",
        "Run it again",
        "Versions and machine",
    ]
    assert page.figures[:6] == ["By round", "By virtual time", "By bits sent"] * 2
    assert html.count('<svg class="picture"') == len(page.figures) == 3 + 3 + 4 + 3 + 3 + 2 + 3
    assert "fedsim run run/config.yaml --out run-again" in html
    assert "88.0 %" in html and "40 Mbit" in html and "80 s" in html
    assert "2.13.0" in html and "two cores" in html


def test_what_a_run_lacks_is_left_out(tmp_path):
    html, page = report(
        write_rows(tmp_path / "run", [{"round": 1, "train_loss": 2.0}, {"round": 2, "train_loss": 1.0}])
    )
    assert page.headings == ["Loss", "Numbers"]
    assert page.figures == ["By round"]


def test_a_run_without_rows_says_so(tmp_path):
    _, page = report(write_rows(tmp_path / "run", []))
    assert page.headings == []


def test_the_page_loads_nothing_and_runs_nothing(whole):
    html, page = whole
    assert page.addresses == [] and "script" not in page.tags and "link" not in page.tags
    assert "@import" not in html and "url(" not in html


def test_colours_follow_the_page(whole):
    html, _ = whole
    assert "prefers-color-scheme: dark" in html
    defined = set(re.findall(r"(--[\w]+):", html))
    assert set(re.findall(r"var\((--\w+)\)", html)) <= defined


def test_strings_of_the_user_are_escaped(tmp_path):
    folder = full(tmp_path / f"run {NASTY.replace('/', '|')}", name=f"'{NASTY}'")
    html, page = report(folder)
    assert "<script" not in html.lower() and "script" not in page.tags
    assert "&lt;script&gt;alert(1)" in html
    assert "$x_" in html and "&amp;amp;" in html


def test_a_run_that_diverged_says_in_which_round(tmp_path):
    rows = [{"round": 1, "train_loss": 2.0}, {"round": 2, "train_loss": None, "nonfinite": ["train_loss"]}]
    html, _ = report(write_rows(tmp_path / "run", rows))
    assert "train_loss was not finite in round 2" in html
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S).lower()


def test_a_run_that_was_never_finite_is_still_reported(tmp_path):
    rows = [{"round": 1, "train_loss": None, "distance": None, "nonfinite": ["train_loss", "distance"]}]
    _, page = report(write_rows(tmp_path / "run", rows))
    assert page.headings == ["Numbers"]


def test_the_same_run_gives_the_same_bytes(tmp_path, whole):
    folder = full(tmp_path / "run")
    assert report(folder)[0] == whole[0]
    assert not list(folder.glob("*.part"))


def test_a_long_run_of_many_clients_stays_small(tmp_path):
    rows = [
        {"round": r, "train_loss": 1 / r, "test_accuracy": 1 - 1 / r, "virtual_seconds": 1.0 * r}
        for r in range(1, 20_001)
    ]
    folder = write_rows(tmp_path / "run", rows, CONFIG.format(seed=0, strategy="fedavg") + "# x" * 200_000)
    counts = np.zeros((50_000, 300), dtype=np.int16)
    counts[np.arange(50_000), np.arange(50_000) % 300] = 1
    np.savez_compressed(folder / "split.npz", counts=counts)
    html, _ = report(folder)
    assert len(html) < 600_000
    assert "100 of 50,000 clients, evenly spaced" in html and "groups of 3 classes" in html


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("split.npz", b"no archive"),
        ("clients.jsonl", b"{oops"),
        ("env.json", b"{oops"),
    ],
)
def test_a_side_file_that_cannot_be_read_is_named(tmp_path, name, content):
    folder = write_rows(tmp_path / "run", curve([0.5]))
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        write_report(tmp_path)


def test_facts_take_names_from_text_and_from_mappings():
    config = {"strategy": "fedavg", "task": {"name": "quadratic"}, "clients": {"count": 1000}, "seed": 3}
    assert facts(config) == ["fedavg", "quadratic", "1,000 clients", "seed 3"]
    config = {"strategy": {"name": "m:S"}, "task": {"dataset": {"name": "d"}, "model": "mlp"}, "partition": "iid"}
    assert facts(config) == ["m:S", "d", "mlp", "iid"]
    assert facts({"partition": {"name": "dirichlet", "alpha": 0.5}, "task": 3}) == ["3", "dirichlet 0.5"]
    for selection, said in ({"name": "oort"}, ["selection oort"]), ({"name": "uniform"}, []):
        assert facts({"strategy": {"name": "fedavg", "selection": selection}}) == ["fedavg", *said]
    assert facts({}) == []
