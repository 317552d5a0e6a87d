"""What a sweep is: everything that its command line says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsim.config import ConfigError, did_you_mean
from fedsim.sweep.space import Space

SEARCHES = ("grid", "random", "tpe")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Many runs of one experiment file.

    Args:
        config: the file.
        space: what to go through.
        folder: where the runs' folders go, and the results.
        seeds: each setting is run with all of them; none: with the file's own.
        search: one of `SEARCHES`.
        trials: settings that each method is tried with, in a search.
        ahead: settings that TPE tries at once without knowing of each other; part of what fixes its proposals.
        target: the metric to judge by; None: the first of `fedsim.report.compare.MEASURES` that runs report.
        minimise: small is good; of a loss or a distance it always is.
        jobs: trials at a time; auto: one a core (or GPU), or one where the file itself asks for Ray.
        address: of a Ray cluster to run on instead of on this machine.

    Raises:
        ConfigError: for options that make no sense together.
    """

    config: Path
    space: Space
    folder: Path
    seeds: tuple[int, ...] = ()
    search: str = "grid"
    trials: int | None = None
    ahead: int = 4
    target: str | None = None
    minimise: bool = False
    jobs: int | Literal["auto"] = "auto"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise ConfigError(f"--search: unknown name {self.search!r}{did_you_mean(self.search, SEARCHES)}")
        if self.search == "grid" and self.trials is not None:
            raise ConfigError("--trials: a grid has as many as it has; leave it out, or add --search random or tpe")
        if self.search != "grid" and (self.trials is None or self.trials < 1):
            raise ConfigError(f"--trials: {self.search} needs a number of settings to try, got {self.trials}")
        if self.jobs != "auto" and self.jobs < 1:
            raise ConfigError(f"--jobs: must be at least 1 or auto, got {self.jobs}")
        if self.ahead < 1:
            raise ConfigError(f"--ahead: must be at least 1, got {self.ahead}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("--seeds: give every seed once")
        if self.seeds and "seed" in self.space.common:
            raise ConfigError("seed: is given twice, as seed= and as --seeds; leave one out")
        bare = [method.name for method in self.space.methods() if not method.axes]
        if bare and self.search != "grid":
            of = f" of {bare[0]}" if bare[0] else ""
            raise ConfigError(f"sweep: no axis{of} to search; give key=log(1e-3,1), or key=a,b")
        if bare and not self.seeds and self.space.per is None:
            raise ConfigError("sweep: no axis; give key=a,b for some keys, or --seeds 0,1,2")


def whole_number(option: str, text: str) -> int:
    """The number of an option that takes one.

    Raises:
        ConfigError: if it is none.
    """
    try:
        return int(text)
    except ValueError as e:
        raise ConfigError(f"{option}: expected auto or a whole number, got {text!r}") from e


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers as an option lists them.

    Raises:
        ConfigError: if they are none.

    >>> whole_numbers("--seeds", "0,1,2")
    (0, 1, 2)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise ConfigError(f"{option}: expected whole numbers, as in {option} 0,1,2, got {text!r}") from e
