"""The table of rules: name -> class, class letters, paper, memory, needs and one honest line.

Letters: E elementwise, T a few numbers per tensor or row, M matrix products, X more than one gradient per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsim.optim import adaptive, elementwise
from fedsim.optim.decode import suggest
from fedsim.optim.rule import Rule


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One named rule.

    Args:
        rule: its class.
        kind: letters E, T, M, X.
        paper: where it is from.
        memory: numbers kept per parameter, beside the parameter and its gradient; as text when it depends.
        note: what a user with few local steps should know, in one line.
        preset: hyper-parameters that this name stands for.
    """

    rule: type[Rule]
    kind: str
    paper: str
    memory: str
    note: str
    preset: Mapping[str, Any] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What the training loop must supply."""
        return self.rule.needs


RULES: dict[str, Entry] = {
    "sgd": Entry(
        rule=elementwise.Sgd,
        kind="E",
        paper="torch.optim.SGD; Sutskever et al. ICML 2013",
        memory="0, with momentum 1",
        note="The baseline that every federated analysis assumes; hard to beat with few local steps.",
    ),
    "adam": Entry(
        rule=adaptive.Adam,
        kind="E",
        paper="arXiv:1412.6980",
        memory="2, with amsgrad 3",
        note="With fresh state and few local steps it is close to sign descent.",
    ),
    "adamw": Entry(
        rule=adaptive.Adam,
        kind="E",
        paper="arXiv:1711.05101",
        memory="2, with amsgrad 3",
        note="With fresh state and few local steps it is close to sign descent with decay.",
        preset={"decay": "decoupled", "weight_decay": 0.01},
    ),
    "amsgrad": Entry(
        rule=adaptive.Adam,
        kind="E",
        paper="arXiv:1904.09237",
        memory="3",
        note="The running maximum has little to remember within one round.",
        preset={"amsgrad": True},
    ),
    "adamw_hf": Entry(
        rule=adaptive.Adam,
        kind="E",
        paper="arXiv:1711.05101, the transformers library's form",
        memory="2",
        note="Raw eps and decay after the step; the base of GaLore and SPAM.",
        preset={"eps_mode": "raw", "eps": 1e-6, "decay": "decoupled_after"},
    ),
    "lion": Entry(
        rule=elementwise.Lion,
        kind="E",
        paper="arXiv:2302.06675, arXiv:2310.05898",
        memory="1",
        note="Every entry moves by lr, so take it 3 to 10 times smaller than Adam's and the decay as much larger.",
    ),
    "adagrad": Entry(
        rule=adaptive.Adagrad,
        kind="E",
        paper="JMLR 12 (2011) 2121",
        memory="1",
        note="Its first step is a sign step; as a server rule it is FedAdagrad.",
    ),
    "rmsprop": Entry(
        rule=adaptive.RmsProp,
        kind="E",
        paper="Tieleman, Hinton 2012; torch.optim.RMSprop",
        memory="1 to 3",
        note="No bias correction: with fresh state the first steps are 1/sqrt(1-alpha) times too long.",
    ),
}


def find_rule(name: str, where: str = "optimizer") -> tuple[type[Rule], Mapping[str, Any]]:
    """The class and preset of a name.

    Raises:
        ValueError: if there is none, with the nearest name.
    """
    suggest(name, tuple(RULES), where, what="optimizer")
    entry = RULES[name]
    return entry.rule, entry.preset or {}
