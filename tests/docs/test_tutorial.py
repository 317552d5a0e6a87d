"""The tutorial runs as it stands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from tests.build import without_wall_time
from tests.docs.blocks import blocks, play

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"
PAGES = ("index", "model", "data", "tasks", "algorithm", "python", "pieces")  # in the order in which they are read


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder in which the whole tutorial was played, and the names its Python left."""
    folder = tmp_path_factory.mktemp("tutorial")
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(folder), *sys.path])
        names = None
        for page in PAGES:
            names = play(blocks(TUTORIAL / f"{page}.md"), folder, f"docs/tutorial/{page}.md", names)
        yield folder, names
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)
    for name in [m for m in sys.modules if m.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


def summary(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / run / "summary.json").read_text())["final"]


def test_every_run_of_the_tutorial_learns(played: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = played
    for run in ("model", "wider", "rings", "npz", "parquet", "folder", "clipped", "looser"):
        assert summary(folder, run)["test_accuracy"] > 0.3, run
        assert (folder / "runs" / run / "report.html").stat().st_size > 20_000


def test_files_of_all_forms_make_the_same_federation(played: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = played
    # one file with owners and one file per owner hold out the same share of rows but draw them from another order
    for run in ("npz", "parquet", "folder"):
        lines = (folder / "runs" / run / "clients.jsonl").read_text().splitlines()
        assert len(lines) == 12 and sum(json.loads(line)["num_examples"] for line in lines) == 480
    one, other = summary(folder, "npz"), summary(folder, "parquet")
    assert without_wall_time([one]) == without_wall_time([other])


def test_the_task_of_the_tutorial_reaches_its_closed_form(played: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = played
    assert summary(folder, "squares")["distance"] <= 1e-5
    rows = (folder / "runs" / "squares" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["train_loss"] > 1 and len(rows) < 100


def test_clinics_predict_numbers_and_quantiles_cover_what_they_should(played: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = played
    assert summary(folder, "clinics")["test_r2"] > 0.9 and summary(folder, "clinics")["personal_mae"] < 0.5
    assert summary(folder, "quantile")["test_covered"] > 0.7
    page = (folder / "runs" / "clinics" / "report.html").read_text()
    assert "Test mae" in page and "Clients&#x27; mae by round" in page or "Clients' mae by round" in page


def test_a_strategys_own_metrics_are_in_its_rows(played: tuple[Path, dict[str, Any]]) -> None:
    folder, names = played
    assert 0 < summary(folder, "clipped")["step_length"] <= 0.5 + 1e-6
    assert {"clipped", "step_length", "test_accuracy"} <= set(names["frame"].columns)
    assert summary(folder, "looser")["clipped"] <= summary(folder, "clipped")["clipped"] <= 1
    assert "clipped" in (folder / "runs" / "clipped" / "metrics.jsonl").read_text()


def test_pictures_and_comparisons_are_written(played: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = played
    assert (folder / "clipping.png").stat().st_size > 5000
    assert "</html>" in (folder / "runs" / "clipping.html").read_text()


def test_runs_from_python_are_as_the_text_says(played: tuple[Path, dict[str, Any]]) -> None:
    folder, names = played
    assert names["history"].rows[-1]["train_loss"] < 0.9 <= names["history"].rows[-2]["train_loss"]
    assert names["best"]["round"] > 1 and names["trained"].training is False
    assert names["simulation"].round == 4 and (folder / "runs" / "stepped" / "checkpoints" / "round-000004").exists()
    assert (folder / "runs" / "logged" / "table.txt").read_text() == "1 10\n2 10\n3 10\n4 10\n"
    assert (folder / "runs" / "logged" / "model.best.safetensors").exists()


def test_the_pieces_by_hand_take_no_more_than_a_screen() -> None:
    (block,) = blocks(TUTORIAL / "pieces.md")
    assert len(block.text.splitlines()) < 45


def test_every_page_is_played_and_can_be_read_at_a_sitting() -> None:
    assert {path.stem for path in TUTORIAL.iterdir()} == set(PAGES)
    assert all((TUTORIAL / f"{page}.md").read_text().count("\n") < 130 for page in PAGES)
