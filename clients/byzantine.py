"""Byzantine clients: what faulty clients send in place of their own vectors.

All attackers know the vectors of the honest clients of the step, and each sends the same vector unless said otherwise.
The vectors may be models or pseudo-gradients: an attack looks at numbers only. Attacks exist in simulation alone.

Sources: sign flip, IPM and ALIE as in ByzFL and in the code of Farhadkhani et al. (MoNNA, ICML 2023); ALIE: Baruch,
Baruch, Goldberg. A little is enough. NeurIPS 2019; IPM (also known as fall of empires): Xie, Koyejo, Gupta. UAI 2019;
mimic: Karimireddy, He, Jaggi. arXiv:2006.09365; the search for the worst factor against a rule: Shejwalkar, Houmansadr.
NDSS 2021, with the steps of ByzFL and of the code of MoNNA.

Letters: H honest clients, b byzantine ones, P entries of a vector, mu [P] the honest mean, s [P] their deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, nan
from statistics import NormalDist
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fedsim.clients.poison import Backdoor, LabelFlip, ModelReplacement
from fedsim.fleet import TooFewRows
from fedsim.sim.byzantine import Knowledge
from fedsim.streams import Streams

SEARCH = 20  # tries of a factor in each search
FIRST, SHRINK = (10.0, 1.0), 0.8  # the first step of each search, and what a step in vain is shortened by


class Attack(Protocol):
    """Frozen settings of an attack."""

    on_data: ClassVar[bool]
    """Whether its clients train on poisoned data (`fedsim.task.Poison`), of which `known.own` comes."""

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        """What the byzantine clients send.

        Args:
            honest: [H, P], the honest clients' vectors of this step, H >= 1.
            b: how many byzantine clients send.
            streams: theirs, b rows.
            known: the step, and what the attack noted in earlier ones; whoever owns it saves it with a checkpoint.

        Returns:
            [b, P], rows perhaps sharing memory; None if they send nothing, so that no reply of theirs arrives.
        """
        ...


class PeerAttack(Attack, Protocol):
    """Frozen settings of an attack that tells every peer something else."""

    def to_each(self, own: Tensor, mean: Tensor, weight: Tensor, streams: Streams, known: Knowledge) -> Tensor:
        """What liars tell the honest peers that hear some of them.

        Args:
            own: [R, P], the peers' own vectors of this step.
            mean: [R, P], the weighted mean of the honest vectors that each hears, its own among them.
            weight: [R], of all liars in what each hears.
            streams: of the peers, R rows.
            known: see `Attack`.

        Returns:
            [R, P]: one vector for each peer, which all liars tell it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SignFlip:
    """Sends -mu; scaled, -mu H / b, which makes the mean of all zero.

    Args:
        scaled: send -mu H / b.
    """

    scaled: bool = False
    on_data: ClassVar[bool] = False

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        factor = len(honest) / max(b, 1) if self.scaled else 1.0
        return _repeat(-factor * honest.mean(dim=0), b)


@dataclass(frozen=True, kw_only=True)
class InnerProduct:
    """FOE, also known as IPM: sends -tau mu. Some write it as (1 - k) mu, so that tau = k - 1.

    Args:
        tau: factor on the honest mean, taken with the other sign; `optimised` seeks, in every step, the one that moves
            the result of the rule in use farthest from the honest mean; among peers, the mean of what honest ones make.
    """

    tau: float | Literal["optimised"] = 2.0
    on_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tau != "optimised" and not (isinstance(self.tau, int | float) and isfinite(self.tau)):
            raise ValueError(f"foe.tau must be a finite factor or optimised, got {self.tau!r}")

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        mu = honest.mean(dim=0)
        if self.tau == "optimised":
            return _repeat(_worst("foe.tau", mu, lambda tau: -tau * mu, b, known), b)
        return _repeat(-self.tau * mu, b)


@dataclass(frozen=True, kw_only=True)
class Alie:
    """A little is enough: sends mu + k s, s with divisor H - 1 (and zero for a single honest client).

    Args:
        k: a factor, negative to subtract; `max` takes the quantile up to which honest clients outnumber those that
            would have to be outvoted: Phi^-1((n - b - q) / (n - b)), q = floor(n / 2) + 1 - b, n = H + b; `optimised`
            seeks, in every step, the one that moves the result of the rule in use farthest from mu; among peers, the
            mean of what honest ones make.
    """

    k: float | Literal["max", "optimised"] = 1.5
    on_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.k not in ("max", "optimised") and not (isinstance(self.k, int | float) and isfinite(self.k)):
            raise ValueError(f"alie.k must be a finite factor, max or optimised, got {self.k!r}")

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        mu = honest.mean(dim=0)
        s = honest.std(dim=0) if len(honest) > 1 else torch.zeros_like(mu)
        if self.k == "optimised":
            return _repeat(_worst("alie.k", mu, lambda k: mu + k * s, b, known), b)
        k = alie_factor(len(honest) + b, b) if self.k == "max" else self.k
        return _repeat(mu + k * s, b)


def alie_factor(n: int, b: int) -> float:
    """The largest k of ALIE for n clients of which b are byzantine.

    Raises:
        ValueError: if the byzantine clients are a majority already, or too few to be one with any number of others.
    """
    outvoted = n // 2 + 1 - b
    share = (n - b - outvoted) / (n - b) if n > b else nan
    if not 0.0 < share < 1.0:
        raise ValueError(f"alie.k=max is not defined for n={n} clients with b={b} byzantine ones; give k a number")
    return NormalDist().inv_cdf(share)


@dataclass(frozen=True, kw_only=True)
class Mimic:
    """Sends a copy of one honest client's vector, so that this client counts too often.

    Args:
        target: row of the honest client that is copied.
        warmup: None copies `target` always; a number of steps learns for so long the direction in which the honest
            vectors differ most, and then copies the client that lies farthest along it.
    """

    target: int = 0
    warmup: int | None = None
    on_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ValueError(f"mimic.target must be a row, at least 0, got {self.target}")
        if self.warmup is not None and self.warmup < 1:
            raise ValueError(f"mimic.warmup must be at least 1 step, got {self.warmup}")

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        if self.target >= len(honest):
            raise ValueError(f"mimic.target={self.target} is not one of the {len(honest)} honest clients of this step")
        if self.warmup is None or not b:
            return _repeat(honest[self.target], b)
        seen = int(known.memory.get("mimic.steps", torch.zeros(())))
        if seen >= self.warmup:
            return _repeat(honest[int((honest @ known.memory["mimic.direction"]).abs().argmax())], b)
        self._learn(honest, streams, known, seen)
        return _repeat(honest[self.target], b)

    def _learn(self, honest: Tensor, streams: Streams, known: Knowledge, seen: int) -> None:
        """One step towards the top direction of the honest vectors' scatter (Oja's rule, lengths normalised)."""
        if not seen:
            z = streams.rows([0]).normal("attack.mimic", honest.shape[1], dtype=honest.dtype)[0]
            z = z / z.norm()
        else:
            z = known.memory["mimic.direction"]
        centred = honest - honest.mean(dim=0)
        pull = (centred @ z) @ centred
        length = pull.norm()
        if float(length) > 0:
            z = seen * z + pull / length
            z = z / z.norm()
        known.memory["mimic.direction"] = z
        known.memory["mimic.steps"] = torch.tensor(seen + 1)


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Sends normal noise, another one for each client.

    Args:
        mean, std: of every entry.
    """

    mean: float = 0.0
    std: float = 1.0
    on_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise ValueError(f"gaussian.std must not be negative, got {self.std}")

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        assert len(streams.clients) == b, f"{b} byzantine clients and {len(streams.clients)} streams"
        noise = streams.normal("attack.gaussian", honest.shape[1], step=known.step, dtype=honest.dtype)
        return self.mean + self.std * noise


@dataclass(frozen=True, kw_only=True)
class Infinity:
    """Sends infinity in every entry."""

    on_data: ClassVar[bool] = False

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        return _repeat(torch.full_like(honest[0], inf), b)


@dataclass(frozen=True, kw_only=True)
class NotANumber:
    """Sends NaN in every entry."""

    on_data: ClassVar[bool] = False

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        return _repeat(torch.full_like(honest[0], nan), b)


@dataclass(frozen=True, kw_only=True)
class Silence:
    """Sends nothing: the replies of these clients never arrive."""

    on_data: ClassVar[bool] = False

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Dissensus:
    """Tells each peer x - epsilon sum_k W_k (x_k - x) / w: what would push it away from the honest ones it hears.

    x is the peer's own vector, the sum is over its honest neighbours k, and w is what liars weigh in what it hears. The
    more a few of them weigh, the less they need to say. He, Karimireddy, Jaggi. arXiv:2202.01545.

    Args:
        epsilon: 1 undoes what honest neighbours say, more drives them apart.
    """

    epsilon: float = 1.0
    on_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isfinite(self.epsilon):
            raise ValueError(f"dissensus.epsilon must be a finite factor, got {self.epsilon}")

    def to_each(self, own: Tensor, mean: Tensor, weight: Tensor, streams: Streams, known: Knowledge) -> Tensor:
        """See `PeerAttack`."""
        return own - (self.epsilon * (1 - weight) / weight)[:, None] * (mean - own)

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        raise ValueError("dissensus tells each peer something else, and a server is one; take a strategy without one")


def _repeat(vector: Tensor, b: int) -> Tensor:
    return vector.expand(b, -1)


def _worst(key: str, mu: Tensor, vector: Callable[[float], Tensor], b: int, known: Knowledge) -> Tensor:
    """[P]: the vector whose sending moves the rule's result farthest from the honest mean, of those tried.

    The factor grows from 0 in steps that double while each is worse than the last; then the steps shrink, as often as
    tries are left. It never gets smaller again, so there are two searches: a long first step passes over the small
    factors that harm most where a rule sees through large ones. In a step of fewer rows than the rule takes nothing
    moves, whatever is sent.

    Args:
        key: of the file, for messages.
        mu: [P].
        vector: of a factor.
        b: how many send it; without any there is nothing to seek.
        known: the rule in use.

    Raises:
        ValueError: if there is no rule that could be tried.
    """
    rule = known.rule
    if rule is None:
        raise ValueError(
            f"{key}=optimised tries factors against what is made of the replies, which this strategy does not tell; "
            "give a number"
        )

    def harm(factor: float) -> float:
        try:
            return float(torch.linalg.vector_norm(rule(_repeat(vector(factor), b)) - mu))
        except TooFewRows:
            return 0.0

    def search(step: float) -> tuple[float, float]:
        best, worst, growing = 0.0, unmoved, True
        for _ in range(SEARCH - 1):
            if (found := harm(best + step)) > worst:
                best, worst = best + step, found
                step *= 2.0 if growing else SHRINK
            else:
                growing = False
                step *= SHRINK
        return worst, best

    if not b:
        return mu
    unmoved = harm(0.0)
    return vector(max((search(step) for step in FIRST), key=lambda found: found[0])[1])


ATTACKS: dict[str, type] = {
    "sign_flip": SignFlip,
    "foe": InnerProduct,
    "ipm": InnerProduct,
    "alie": Alie,
    "mimic": Mimic,
    "dissensus": Dissensus,
    "label_flip": LabelFlip,
    "backdoor": Backdoor,
    "model_replacement": ModelReplacement,
    "gaussian": Gaussian,
    "infinity": Infinity,
    "nan": NotANumber,
    "silence": Silence,
}
