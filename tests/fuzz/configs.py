"""Experiment files with something wrong: the ones that come with fedsim, a key or a value of theirs changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from numpy.random import Generator

from fedsim.overrides import read_file

CONFIGS = Path(__file__).parents[2] / "configs"
SLOW = ("fashion_mnist_fedavg", "language_model")  # whose data take their time to read

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 17, 10**6, 10**9, 10**12, 2**63, 10**30, -(10**9)),
    *(0.0, 0.5, -0.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"), 1.5),
    *("", " ", "x", "none", "auto", "full", "mean", "1e3", "-1", "0x10", "${seed}", "${nothing}", "${", "a.b", "a:b"),
    *("no.such:Thing", "math:pi", "builtins:list", "iid", "sgd", "adam", "top_k", "median", "\0", "\u2028", "é" * 300),
    *([], [1], [0, -1], ["x"], [[1], [2, 3]], [None], {}, {"name": "x"}, {"name": None}, {"name": "sgd"}, {"name": 3}),
    *({"k": 1}, {"name": "top_k", "k": 10**9}, {"name": "iid", "extra": 1}, {1: 2}, {None: None}, {"": ""}),
]  # fmt: skip


def shipped() -> list[dict[str, Any]]:
    """The content of every experiment file that is quickly composed."""
    return [read_file(path) for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in SLOW]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(mapping or list, key) of every value in a file."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def mutated(configs: list[dict[str, Any]], rng: Generator) -> dict[str, Any]:
    """A file with one thing changed, or two."""
    raw = copy.deepcopy(configs[rng.integers(len(configs))])
    for _ in range(1 + rng.integers(4) // 3):
        if not (found := list(places(raw))):
            break
        owner, key = found[rng.integers(len(found))]
        value, kind = owner[key], rng.integers(10)
        if kind < 3 and isinstance(
            value, int | float
        ):  # a number that is far too large, too small, or of the wrong sign
            owner[key] = [-value, 0 * value, value * 10**6, value * 10**12, value / 1e6, value + 0.5][rng.integers(6)]
        elif kind < 6:
            owner[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        elif kind == 6:
            owner.pop(key)
        elif kind == 7 and isinstance(owner, dict):
            owner[f"{key}{['s', '_', '.x', ' ', ''][rng.integers(5)]}"] = owner.pop(key)
        else:  # what stands elsewhere in this or another file, under its own name or in this one's place
            elsewhere = list(places(configs[rng.integers(len(configs))]))
            other, at = elsewhere[rng.integers(len(elsewhere))]
            owner[at if isinstance(owner, dict) and kind == 8 else key] = copy.deepcopy(other[at])
    return raw


def text_of(raw: dict[str, Any]) -> str:
    """The file."""
    return yaml.safe_dump(raw, allow_unicode=True)
