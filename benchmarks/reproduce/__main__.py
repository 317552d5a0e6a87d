"""Run a published result again: `make reproduce NAME=momentum`, or

    python -m benchmarks.reproduce NAME [--quick]

Writes docs/reproductions/NAME.md and its figures. The runs lie in runs/reproduce/NAME, and the same command goes on
with those that are there. --quick plays everything at a tiny budget, in runs/reproduce/NAME-quick, page and figures
included: it shows that the command works and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.reproduce import asynchronous, coding, masha, momentum, monna, personalisation

# NAME -> function of (folder of the runs, folder of the figures, quick) that gives the page's text
TABLE: dict[str, Callable[[Path, Path, bool], str]] = {
    "asynchronous": asynchronous.reproduce,
    "coding": coding.reproduce,
    "masha": masha.reproduce,
    "momentum": momentum.reproduce,
    "monna": monna.reproduce,
    "personalisation": personalisation.reproduce,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(TABLE))
    parser.add_argument("--quick", action="store_true", help="a tiny budget, and nothing written to docs/")
    arguments = parser.parse_args()
    runs = Path("runs/reproduce") / (arguments.name + "-quick" * arguments.quick)
    pages = runs if arguments.quick else Path("docs/reproductions")
    figures = pages / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    page = pages / f"{arguments.name}.md"
    page.write_text(TABLE[arguments.name](runs, figures, arguments.quick), encoding="utf-8")
    print(f"page: {page}")


if __name__ == "__main__":
    main()
