"""Which setting comes next: a whole grid, random draws, or TPE, which learns from the results.

All of them are keyed by the seed. What TPE proposes depends on earlier results, so it is asked in a fixed order:
proposal number k knows the results of the first k - `ahead` + 1 settings, told in their order, and of no others,
whoever finished first. So the same sweep proposes the same with any number of jobs, and a sweep that was stopped
proposes again what it had proposed: nothing of the search has to be saved.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from fedsim.config import ConfigError
from fedsim.streams import server_rng
from fedsim.sweep.space import Axis, Choice, Method, Setting


class Search(Protocol):
    """Proposes the settings of one method."""

    def known(self) -> list[Setting]:
        """Settings to check before anything runs: all of them, where they are known by then."""
        ...

    def next(self) -> Setting | None:
        """The next setting; None if there is none, or none before more results are told."""
        ...

    def tell(self, setting: Setting, value: float | None) -> None:
        """The result of a setting, small if it is good; None where there is none."""
        ...


class Listed:
    """Settings that are known from the start."""

    def __init__(self, settings: Iterable[Setting]) -> None:
        self._settings = list({setting.name: setting for setting in settings}.values())
        self._left = deque(self._settings)

    def known(self) -> list[Setting]:
        return self._settings

    def next(self) -> Setting | None:
        return self._left.popleft() if self._left else None

    def tell(self, setting: Setting, value: float | None) -> None:
        pass


def random_settings(method: Method, count: int, seed: int) -> Listed:
    """Independent draws; every draw has a stream of its own, so more of them begin with the same ones."""
    drawn = []
    for number in range(count):
        shares = server_rng(seed, f"sweep/{method.name}", number).random(len(method.axes))
        chosen = {
            key: axis.values[int(share * len(axis.values))] if isinstance(axis, Choice) else axis.at(share)
            for (key, axis), share in zip(method.axes.items(), shares, strict=True)
        }
        drawn.append(method.setting(chosen))
    return Listed(drawn)


class Tpe:
    """The tree-structured Parzen estimator of Optuna.

    Bergstra, Bardenet, Bengio, Kegl. Algorithms for Hyper-Parameter Optimization. NeurIPS 2011. The first ten
    proposals are random. A setting without a result counts as the worst of all, so that TPE keeps away from what
    diverges.

    Args:
        method: whose axes.
        count: proposals.
        seed: of the draws.
        ahead: proposals under way that don't know of each other's results.

    Raises:
        ConfigError: if Optuna is not installed.
    """

    def __init__(self, method: Method, count: int, seed: int, *, ahead: int) -> None:
        try:
            import optuna
        except ImportError as e:
            raise ConfigError("--search tpe needs Optuna; pip install 'fedsim-stacks[sweep]', or use random") from e
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        key = int(server_rng(seed, f"sweep/{method.name}").integers(2**31))
        sampler = optuna.samplers.TPESampler(seed=key)
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._method, self._count, self._ahead = method, count, ahead
        self._space = {key: _distribution(optuna.distributions, axis) for key, axis in method.axes.items()}
        self._asked: list[tuple[Any, Setting]] = []
        self._values: dict[str, float] = {}
        self._told = 0

    def known(self) -> list[Setting]:
        """Every listed value and both ends of every range, since proposals come later."""
        axes = self._method.axes
        most = max(len(axis.values) if isinstance(axis, Choice) else 2 for axis in axes.values())
        return [self._method.setting({key: _corner(axis, i) for key, axis in axes.items()}) for i in range(most)]

    def next(self) -> Setting | None:
        k = len(self._asked)
        if k == self._count:
            return None
        while self._told <= k - self._ahead:
            trial, setting = self._asked[self._told]
            if setting.name not in self._values:
                return None
            self._study.tell(trial, self._values[setting.name])
            self._told += 1
        trial = self._study.ask(self._space)
        setting = self._method.setting({key: self._decoded(key, trial.params[key]) for key in self._method.axes})
        self._asked.append((trial, setting))
        return setting

    def tell(self, setting: Setting, value: float | None) -> None:
        self._values[setting.name] = math.inf if value is None else value

    def _decoded(self, key: str, proposed: Any) -> Any:
        axis = self._method.axes[key]
        return axis.values[proposed] if isinstance(axis, Choice) else axis.plain(proposed)


def _corner(axis: Axis, number: int) -> Any:
    if isinstance(axis, Choice):
        return axis.values[min(number, len(axis.values) - 1)]
    return axis.plain(axis.high if number else axis.low)


def _distribution(distributions: Any, axis: Axis) -> Any:
    """Optuna's own words for an axis; choices by their place, since it takes no lists or mappings."""
    if isinstance(axis, Choice):
        return distributions.CategoricalDistribution(range(len(axis.values)))
    if axis.kind == "int":
        return distributions.IntDistribution(int(axis.low), int(axis.high))
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.kind == "log")
