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
        rule: what the server would make [P] of all replies of the step if the byzantine clients sent some [b, P]; None
            where it makes no one vector of them. Given for one call, and never kept.
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
        known: {field: what the attack noted}.
    """

    ids: Tensor
    attack: Callable[[Tensor, int, Streams, Any], Tensor | None]
    seed: int
    rule: Callable[[Tensor, Tensor], Tensor] | None = None
    known: dict[str, Knowledge] = field(default_factory=dict)

    def honest(self, ids: Tensor) -> Tensor:
        """[R] bool: which of these clients are honest."""
        return ~torch.isin(ids, self.ids)

    def deliver(self, ids: Tensor, fields: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(which replies arrive [R] bool, fields with byzantine rows replaced)."""
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
            given = replace(known, rule=self._rule(value, ~at, ids), own=value[~at])
            sent = self.attack(seen, len(bad), streams, given)
            if sent is None:
                return good, {k: v[good.to(v.device)] if v.ndim else v for k, v in fields.items()}
            value[~at] = sent.to(value)
        return arrive, out

    def _rule(self, rows: Tensor, where: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor] | None:
        """`Knowledge.rule` for rows [R, P] of clients ids [R], of which the attack writes some, `where` [R] bool."""
        rule = self.rule
        if rule is None:
            return None

        def made(sent: Tensor) -> Tensor:
            rows[where] = sent.to(rows)
            return rule(rows, ids)

        return made

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
        lies = getattr(self.attack, "to_each", None)
        if lies is None:
            arrive, sent = self.deliver(ids, fields, step)
            if bool(arrive.all()):
                return arrive, sent, links
            return arrive, fields, links.without(~arrive[links.peers] & ~links.is_own)
        good, out, n = self.honest(ids), dict(fields), len(ids)
        told = ~good[links.peers] & good[links.hearers]
        receivers, place = torch.unique(links.hearers[told], return_inverse=True)
        here = links.rows(receivers)
        honest = good[here.peers]
        weight = 1.0 - here.sums(here.weights.where(honest, 0.0))
        trusted = here.chosen(honest, here.weights / (1.0 - weight)[here.hearers])
        streams = Streams(self.seed, ids[receivers], torch.full_like(receivers, step))
        for name, value in fields.items():
            if value.ndim > 1 and len(receivers):
                known = self.known.setdefault(name, Knowledge())
                known.step = step
                mean = trusted.to(value.device).mix(value)
                told_them = lies(value[receivers.to(value.device)], mean, weight.to(value), streams, known)
                out[name] = torch.cat([value, told_them.to(value)])
        peers = links.peers.clone()
        peers[told] = n + place
        return torch.ones(n, dtype=torch.bool), out, replace(links, peers=peers)


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
    may_be = good[heard.peers.clamp(max=len(good) - 1)] & (heard.peers < len(good)) & ~heard.is_own
    return heard.without(may_be & (heard.ranks(torch.where(may_be, drawn, 2.0)) < missing))
