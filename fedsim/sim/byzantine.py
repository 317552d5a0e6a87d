"""Byzantine clients in the simulator: their vectors are replaced when replies are delivered.

An attack sees the vectors of the honest clients that arrive together with its own, which no real adversary could
do better than; where none does, those that its clients would honestly have sent. It runs once for every
vector-valued field of the replies. An attack with a method `to_each` tells every receiver something else.

Letters: R replies, H honest and b byzantine ones among them, P entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.graph import Graph
from fedsim.streams import Streams


@dataclass
class Knowledge:
    """What an attack knows besides the honest vectors.

    Args:
        step: the server's.
        memory: what the attack noted in earlier steps.
        rule: what the server would make [P] of all replies of the step if the byzantine clients sent some [b, P], or
            the mean [P] of what honest peers would make of what they hear; in `to_each`, what those who are told
            something [R, P] would each make [R, P]. None where nobody knows. Given for one call, and never kept.
        own: [b, P], what its clients would have sent as honest ones, from poisoned data where the attack has such.
            Given likewise.
    """

    step: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    rule: Callable[[Tensor], Tensor] | None = None
    own: Tensor | None = None


@dataclass(kw_only=True)
class Byzantine:
    """Which clients are byzantine and what they do.

    Args:
        ids: [b] clients.
        attack: (honest [H, P], b, streams, knowledge) -> [b, P], or None if they send nothing.
        seed: of the run.
        rule: (rows [R, P], whose they are [R]) -> [P], what the strategy makes of replies; None if no one vector.
        mix: (vectors sent [M, P], who of C peers heard which) -> [C, P], what peers make of them; None without peers.
        known: {field: what the attack noted}.
    """

    ids: Tensor
    attack: Callable[[Tensor, int, Streams, Any], Tensor | None]
    seed: int
    rule: Callable[[Tensor, Tensor], Tensor] | None = None
    mix: Callable[[Tensor, Graph], Tensor] | None = None
    known: dict[str, Knowledge] = field(default_factory=dict)

    def honest(self, ids: Tensor) -> Tensor:
        """[R] bool: which of these clients are honest."""
        return ~torch.isin(ids, self.ids)

    def deliver(self, ids: Tensor, fields: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(which replies arrive [R] bool, fields with byzantine rows replaced)."""
        rule = self.rule
        return self._replaced(ids, fields, step, None if rule is None else lambda rows: rule(rows, ids))

    def _replaced(
        self, ids: Tensor, fields: dict[str, Tensor], step: int, rule: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `deliver`; `rule` says what is made [P] of all rows [R, P]."""
        good = self.honest(ids)
        arrive = torch.ones(len(ids), dtype=torch.bool)
        if bool(good.all()):
            return arrive, fields
        out = dict(fields)
        bad = ids[~good]
        for name, value in fields.items():
            if value.ndim < 2:
                continue
            known = self.known.setdefault(name, Knowledge())
            known.step = step
            at = good.to(value.device)
            seen = value[at] if bool(good.any()) else value
            streams = Streams(self.seed, bad.to(value.device), torch.full_like(bad, step).to(value.device))
            out[name] = value = value.clone()
            given = replace(known, rule=rule and _after(rule, value, ~at), own=value[~at])
            sent = self.attack(seen, len(bad), streams, given)
            if sent is None:
                return good, {k: v[good.to(v.device)] if v.ndim else v for k, v in fields.items()}
            value[~at] = sent.to(value)
        return arrive, out

    def tell(
        self, ids: Tensor, fields: dict[str, Tensor], links: Graph, step: int
    ) -> tuple[Tensor, dict[str, Tensor], Graph]:
        """What peers hear in an exchange.

        Args:
            ids: [R] clients.
            fields: {name: [R, P]}, what each would honestly send.
            links: who hears whom of them.
            step: the server step.

        Returns:
            (who sends anything [R] bool, {name: [M, P]} with the lies, who hears which of these rows).
        """
        good, n, mix = self.honest(ids), len(ids), self.mix
        if not hasattr(self.attack, "to_each"):
            heard = links.rows(good.nonzero()[:, 0])
            rule = None if mix is None else lambda v: mix(v, heard.to(v.device)).mean(0)
            arrive, sent = self._replaced(ids, fields, step, rule)
            if bool(arrive.all()):
                return arrive, sent, links
            return arrive, fields, links.without(~arrive[links.peers] & ~links.is_own)
        told = ~good[links.peers] & good[links.hearers]
        receivers, place = torch.unique(links.hearers[told], return_inverse=True)
        peers = links.peers.clone()
        peers[told] = n + place
        heard = replace(links, peers=peers)
        out = self._told(ids[receivers], fields, heard.rows(receivers), step) if len(receivers) else fields
        return torch.ones(n, dtype=torch.bool), out, heard

    def _told(self, ids: Tensor, fields: dict[str, Tensor], heard: Graph, step: int) -> dict[str, Tensor]:
        """What n peers would honestly send, and below it what each honest one is told that hears liars.

        Args:
            ids: [R], those who are told something.
            fields: {name: [n, P]}.
            heard: by these, rows from n on being what they are told.
            step: the server step.

        Returns:
            {name: [n + R, P]}.
        """
        attack: Any = self.attack
        honest = heard.peers < len(next(iter(fields.values())))
        weight = 1.0 - heard.sums(heard.weights.where(honest, 0.0))
        trusted = heard.chosen(honest, heard.weights / (1.0 - weight)[heard.hearers])
        streams = Streams(self.seed, ids, torch.full_like(ids, step))
        out = dict(fields)
        for name, value in fields.items():
            if value.ndim > 1:
                known = self.known.setdefault(name, Knowledge())
                known.step = step
                own, mean = value[heard.own.to(value.device)], trusted.to(value.device).mix(value)
                given = replace(known, rule=self.mix and _after_these(self.mix, value, heard))
                out[name] = torch.cat([value, attack.to_each(own, mean, weight.to(value), streams, given).to(value)])
        return out


def _after(rule: Callable[[Tensor], Tensor], rows: Tensor, where: Tensor) -> Callable[[Tensor], Tensor]:
    """What a rule makes of rows [R, P], of which the attack writes some, `where` [R] bool."""

    def made(sent: Tensor) -> Tensor:
        rows[where] = sent.to(rows)
        return rule(rows)

    return made


def _after_these(mix: Callable[[Tensor, Graph], Tensor], rows: Tensor, heard: Graph) -> Callable[[Tensor], Tensor]:
    """What peers make of rows [n, P] that all hear and one more that each alone is told."""
    return lambda sent: mix(torch.cat([rows, sent.to(rows)]), heard.to(rows.device))


def held_back(streams: Streams, heard: Graph, good: Tensor, missing: int) -> Graph:
    """What still reaches clients when an adversary holds vectors back on their way.

    Args:
        streams: of the R clients.
        heard: by each of them.
        good: [R] bool, whether they are honest.
        missing: honest vectors that never reach a client, drawn for each; its own and the byzantine ones always do.
    """
    row = torch.arange(len(heard.peers)) - heard.start[heard.hearers]
    drawn = streams.uniform("arrival", int(heard.counts.max()), dtype=torch.float64)[heard.hearers, row]
    may_be = good[heard.peers] & ~heard.is_own
    return heard.without(may_be & (heard.ranks(torch.where(may_be, drawn, 2.0)) < missing))
