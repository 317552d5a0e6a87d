"""python -m benchmarks.reproduce NAME...: run published results again and write docs/reproductions/NAME.md."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.reproduce import coding

PAGES = Path("docs/reproductions")
REPRODUCTIONS: dict[str, Callable[[Path], None]] = {"coding": coding.reproduce}
"""{name: writes its page and figures into a folder}."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(REPRODUCTIONS), metavar="NAME", help=", ".join(REPRODUCTIONS))
    parser.add_argument("--out", type=Path, default=PAGES, help=f"folder of the pages; {PAGES}")
    arguments = parser.parse_args()
    for name in arguments.names:
        arguments.out.mkdir(parents=True, exist_ok=True)
        REPRODUCTIONS[name](arguments.out)
        print(arguments.out / f"{name}.md")


if __name__ == "__main__":
    main()
