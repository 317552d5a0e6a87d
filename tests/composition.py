"""Which parts go together: the matrix of docs/composition.md, found by composing every pair.

    python -m tests.composition > docs/composition.md

Every strategy of the table is put together with every option below on a small problem. What the parts refuse is
refused with the reason that a user would read; a test runs every pair that is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.overrides import apply_overrides
from fedsim.strategies import STRATEGIES

SMALL: dict[str, Any] = {
    "seed": 0,
    "rounds": 3,
    "task": {"name": "classification", "dataset": "digits", "model": "logistic"},
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "clients": {"count": 8, "devices": {"name": "f_x", "x": 50}},
    "local": {"steps": 2, "batch_size": 10, "optimizer": {"name": "sgd", "lr": 0.05}},
    "evaluate": {"every": 3, "per_client": False},
}
"""A problem on which every strategy takes a few rounds in no time."""

PART = ["*[bx]*"]  # the bias of a classifier, and the vector x of a formula
FIELDS: dict[str, dict[str, Any]] = {
    "fedbn": {"personal": PART},
    "fedper": {"personal": PART},
    "fedrep": {"personal": PART, "head_epochs": 2},
    "fedfix": {"interval": 0.5},
    "fedbuff": {"buffer_size": 3},
    "fedbuff_stream": {"buffer_size": 3, "concurrency": 4},
    "monna": {"beta": 0.9, "f": 1},
    "gradient_tracking": {"topology": "ring"},
    "clipped_gossip": {"f": 1, "topology": {"name": "random_regular", "redraw": 1}},
    "bridge": {"topology": "torus"},
    "extragradient": {"lr": 0.05},
    "optimistic_gradient": {"lr": 0.05},
    "masha1": {"lr": 0.02},
    "masha2": {"lr": 0.05},
    "uncoded": {"lr": 0.1},
    "gradient_coding": {"lr": 0.1, "s": 2},
    "sr_sgc": {"lr": 0.1, "B": 1, "W": 2, "lam": 3},
    "m_sgc": {"lr": 0.1, "B": 1, "W": 2, "lam": 3},
}
"""Hyper-parameters without a default, or whose default does not fit eight clients."""

OPTIONS: dict[str, dict[str, Any]] = {
    "uplink rand_k": {"uplink.compressor": {"name": "rand_k", "fraction": 0.5}},
    "uplink top_k, error feedback": {
        "uplink.compressor": {"name": "top_k", "fraction": 0.1},
        "uplink.error_feedback": True,
    },
    "downlink natural": {"downlink.compressor": "natural"},
    "trimmed mean": {"strategy.aggregator": {"name": "trimmed_mean", "f": 1}},
    "NNM before it": {
        "strategy.pre_aggregators": [{"name": "nnm", "f": 1}],
        "strategy.aggregator": {"name": "trimmed_mean", "f": 1},
    },
    "chosen by samples": {"strategy.selection": "by_samples", "strategy.cohort_size": 4},
    "chosen by Oort": {"strategy.selection": "oort"},
    "byzantine ALIE": {"clients.byzantine": {"attack": "alie", "count": 1}},
    "ALIE, optimised": {"clients.byzantine": {"attack": {"name": "alie", "k": "optimised"}, "count": 1}},
    "label flip": {"clients.byzantine": {"attack": "label_flip", "count": 1}},
    "random clocks": {"clients.devices": {"name": "exponential", "mean": 1.0, "x": 50}},
    "absence": {
        "clients.availability": {"name": "markov", "on_seconds": 3.0, "off_seconds": 1.0},
        "clients.dropout.probability": 0.1,
    },
    "late replies kept": {"strategy.deadline": 0.8, "strategy.late": "keep"},
    "server Adam": {"strategy.server_optimizer": {"name": "adam", "lr": 0.01}},
    "local AdamW": {"local.optimizer": {"name": "adamw", "lr": 0.01}},
    "local momentum, clipped": {
        "local.optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "clip": {"global": 1.0}}
    },
    "quadratic task": {"task": {"name": "quadratic", "dim": 5}, "partition": None},
    "bilinear task": {"task": {"name": "bilinear", "dim": 5}, "partition": None},
}


def pair(strategy: str, option: str | None) -> dict[str, Any]:
    """The small experiment with one strategy and one option."""
    raw = {**SMALL, "strategy": {"name": strategy, **FIELDS.get(strategy, {})}}
    if "local" not in signature(STRATEGIES[strategy]).parameters:
        raw.pop("local")
    given = apply_overrides(raw, OPTIONS[option] if option else {}, "pair")
    if STRATEGIES[strategy].traits.own_models and given["task"]["name"] == "classification":
        given["data"] = {"client_test": 0.2}  # or nothing would say how good these models are
    return given


@cache
def refusal(strategy: str, option: str | None) -> str | None:
    """Why a pair is refused, or None if it composes."""
    try:
        compose(pair(strategy, option), "pair").close()
    except ConfigError as e:
        return str(e).removeprefix("pair: ")
    return None


def matrix() -> dict[tuple[str, str], str | None]:
    """{(strategy, option): reason of refusal or None}."""
    return {(s, o): refusal(s, o) for s in STRATEGIES for o in OPTIONS}


def page() -> str:
    """docs/composition.md."""
    found = matrix()
    lines = [
        "# What goes together",
        "",
        "Made by `python -m tests.composition`; a test runs every pair marked ✓ for a few rounds and compares this",
        "page with what the code says. A number refers to a reason below, which is also the message that a user gets.",
        "",
        "| strategy | " + " | ".join(OPTIONS) + " |",
        "| --- |" + " :-: |" * len(OPTIONS),
    ]
    reasons: dict[str, int] = {}
    for strategy in STRATEGIES:
        cells = []
        for option in OPTIONS:
            why = found[strategy, option]
            if why is None:
                cells.append("✓")
            else:
                cells.append(str(reasons.setdefault(why.replace(strategy, "this strategy"), len(reasons) + 1)))
        lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{k}. {why}" for why, k in reasons.items()), ""]
    lines += ["Several options combine as their pairs do; for example:", ""]
    lines += [f"- `{name}`: {title}" for name, title in examples().items()]
    return "\n".join(lines) + "\n"


def examples(folder: Path = Path("configs")) -> Mapping[str, str]:
    """{config: its first comment line} of the configs that combine several parts."""
    names = ("fedavg_compressed", "fedavg_robust", "fedadam", "fedfix_compressed", "scaffold_m_adamw", "monna")
    out = {}
    for name in names:
        path = folder / f"{name}.yaml"
        out[str(path)] = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return out


if __name__ == "__main__":
    print(page(), end="")
