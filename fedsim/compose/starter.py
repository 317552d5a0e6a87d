"""A first experiment file for a strategy and a data set, with every key that it may have and what each means."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from fedsim.compose.keys import NEEDED, Key, keys_of, keys_of_entry, paragraph, yaml_of
from fedsim.compose.sections import Local
from fedsim.compose.tables import TABLES
from fedsim.config import named
from fedsim.hints import parameters
from fedsim.strategies.server import Synchronous
from fedsim.strategy import Strategy

FIRST = {"interval": 1.0, "lr": 0.1, "s": 2, "B": 1, "W": 2, "lam": 4, "path": "my-data", "dataset": "CIFAR10"}
"""Values to begin with, of keys that have no default."""
SUIT = {
    "shakespeare": ("classification", "char_lstm"),
    "fashion_mnist": ("classification", "cnn"),
    "diabetes": ("regression", "mlp"),
    "marks": ("multilabel", "mlp"),
}
"""{data set: (task, model) that suit it}; classification and mlp do the others."""
OWNERS = ("shakespeare", "synthetic")  # data sets whose samples belong to clients of their own
NUM_CLIENTS, COHORT, WIDTH = 20, 5, 100


def starter(strategy: str, dataset: str) -> str:
    """The file as text; `fedsim check` accepts it where the data set is there.

    Args:
        strategy, dataset: names of their tables, or import paths.

    Raises:
        ConfigError: for an unknown name.
    """
    target = named(TABLES["strategies"], strategy, "--strategy")[0]
    named(TABLES["datasets"], dataset, "--dataset")
    known = target if isinstance(target, type) and issubclass(target, Strategy) else Strategy
    first = {"concurrency": COHORT} | ({"cohort_size": COHORT} if issubclass(known, Synchronous) else {})
    task, model = SUIT.get(dataset, ("classification", "mlp"))
    taken = {key.name for key in keys_of_entry("strategies", strategy)}
    lines = [
        f"# {strategy} on {dataset}. Lines that begin with '# key:' show a default; take the '# ' away to change it.",
        "# fedsim check FILE says what will run, fedsim run FILE runs it, fedsim list TABLE ENTRY explains any entry.",
        "seed: 0",
        "rounds: 50",
        "task:",
        f"  name: {task}",
        "  dataset:",
        *_entry("datasets", dataset, {}, "    "),
        f"  model: {'resnet_bn' if strategy == 'fedbn' else model}",
    ]
    if dataset in OWNERS:
        lines += ["partition: natural  # one client for each owner of the data"]
    else:
        different = "{name: dirichlet, alpha: 0.5}  # smaller alpha, more different clients"
        lines += [f"partition: {different if task == 'classification' else 'iid'}"]
        lines += [f"clients: {{count: {NUM_CLIENTS}}}"]
    if known.traits.own_models:
        lines += ["data: {client_test: 0.2}  # what each client holds out, to see how good its own model is"]
    about = [f"# {line}" for line in paragraph("strategies", strategy).splitlines()]
    lines += [
        *about,
        "strategy:",
        *_entry("strategies", strategy, {k: v for k, v in first.items() if k in taken}, "  "),
    ]
    if "local" in parameters(target):
        values = {"batch_size": 20, "optimizer": {"name": "sgd", "lr": 0.05}}
        lines += ["local:", *_keys(keys_of(Local), values, "  ")]
    lines += ["evaluate: {every: 5}", ""]
    return "\n".join(lines)


def _entry(table: str, name: str, values: dict[str, object], indent: str) -> Iterator[str]:
    yield f"{indent}name: {name}"
    yield from _keys(keys_of_entry(table, name), values, indent)


def _keys(keys: list[Key], values: dict[str, object], indent: str) -> Iterator[str]:
    """Every key with its meaning above it; those with a value as they are, the others as remarks."""
    for key in keys:
        yield from (f"{indent}# {line}" for line in textwrap.wrap(key.meaning, WIDTH))
        if key.default is NEEDED or key.name in values:
            yield f"{indent}{key.name}: {yaml_of(values.get(key.name, FIRST.get(key.name)))}"
        else:
            yield f"{indent}# {key.name}: {key.default_text}"
