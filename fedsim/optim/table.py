"""The table of rules: name -> class, class letters, paper, memory, needs and one honest line.

Letters: E elementwise, T a few numbers per tensor or row, M matrix products, X more than one gradient per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsim.optim import (
    adafactor,
    adam_kin,
    adaptive,
    averaging,
    dct,
    elementwise,
    extra,
    frugal,
    galore,
    matrix,
    per_tensor,
    projected,
    sparse_spam,
)
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
        settings: settings of the whole optimizer (`spec.Settings`) that it stands for.
    """

    rule: type[Rule]
    kind: str
    paper: str
    memory: str
    note: str
    preset: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What the training loop must supply."""
        if "zeroth_order" in (self.settings or {}):
            return (self.rule.needs - {"grad"}) | {"loss_eval"}
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
    "nadam": Entry(
        rule=adaptive.NAdam,
        kind="E",
        paper="Dozat 2016; torch.optim.NAdam",
        memory="2",
        note="Adam with Nesterov momentum; the same remark on few local steps holds.",
    ),
    "radam": Entry(
        rule=adaptive.RAdam,
        kind="E",
        paper="arXiv:1908.03265",
        memory="2",
        note="With beta2=0.999 its first five steps are plain momentum, often the whole round.",
    ),
    "yogi": Entry(
        rule=adam_kin.Yogi,
        kind="E",
        paper="NeurIPS 2018 (Zaheer et al.)",
        memory="2",
        note="Large eps makes it tamer than Adam; as a server rule it is FedYogi.",
    ),
    "adabelief": Entry(
        rule=adam_kin.AdaBelief,
        kind="E",
        paper="arXiv:2010.07468",
        memory="2, with amsgrad 3",
        note="Long steps where gradients agree with their mean; few local steps give it little mean to believe.",
    ),
    "diffgrad": Entry(
        rule=adam_kin.DiffGrad,
        kind="E",
        paper="arXiv:1909.11015",
        memory="3",
        note="Steady or tiny gradients halve the step; otherwise close to Adam.",
    ),
    "adan": Entry(
        rule=adam_kin.Adan,
        kind="E",
        paper="arXiv:2208.06677",
        memory="4",
        note="Slow averages (0.98, 0.92, 0.99): within one round it is close to its first gradients.",
    ),
    "lion_k": Entry(
        rule=elementwise.LionK,
        kind="E/T",
        paper="arXiv:2310.05898",
        memory="1",
        note="Lion with another geometry; not every kappa was in the authors' experiments.",
    ),
    "spam": Entry(
        rule=adam_kin.Spam,
        kind="E",
        paper="arXiv:2501.06842",
        memory="2",
        note="Its interval of 500 never comes within a round: use state_scope client, or set interval.",
    ),
    "spam_sparse": Entry(
        rule=sparse_spam.SparseSpam,
        kind="T",
        paper="arXiv:2501.06842",
        memory="3",
        note="Moments on a random part of each matrix; dense here, so it saves no memory in simulation.",
    ),
    "signsgd": Entry(
        rule=elementwise.SignSgd,
        kind="E",
        paper="arXiv:1802.04434",
        memory="0",
        note="Every entry moves by lr, whatever the gradient's size.",
    ),
    "signum": Entry(
        rule=elementwise.Signum,
        kind="E",
        paper="arXiv:1802.04434",
        memory="1",
        note="Sign of a running mean; the mean is mostly the first gradient in a short round.",
    ),
    "optimistic": Entry(
        rule=elementwise.Optimistic,
        kind="E",
        paper="arXiv:1311.1869",
        memory="1",
        note="For games and min-max tasks; on plain minimisation no better than SGD.",
    ),
    "eg": Entry(
        rule=elementwise.ExponentiatedGradient,
        kind="E",
        paper="Cornford et al. 2024",
        memory="0",
        note="Weights keep their sign and zeros stay zero, so initialise accordingly.",
    ),
    "sgld": Entry(
        rule=elementwise.Sgld,
        kind="E",
        paper="ICML 2011 (Welling, Teh)",
        memory="0",
        note="A sampler: noise is keyed by client and step; averaging clients averages the noise away.",
    ),
    "sghmc": Entry(
        rule=elementwise.Sghmc,
        kind="E",
        paper="arXiv:1402.4102",
        memory="1",
        note="A sampler with momentum; see sgld.",
    ),
    "schedule_free_sgd": Entry(
        rule=averaging.ScheduleFreeSgd,
        kind="E",
        paper="arXiv:2405.15682",
        memory="1",
        note="Clients must send the average x (Optimizer.final), not y; its weights start anew each round.",
    ),
    "schedule_free_adamw": Entry(
        rule=averaging.ScheduleFreeAdamW,
        kind="E",
        paper="arXiv:2405.15682",
        memory="2",
        note="Clients must send the average x (Optimizer.final), not y; its weights start anew each round.",
    ),
    "adamp": Entry(
        rule=projected.AdamP,
        kind="T",
        paper="arXiv:2006.08217",
        memory="2",
        note="Matters where weights are scale-invariant (before a normalisation layer); else it is AdamW.",
    ),
    "sgdp": Entry(
        rule=projected.SgdP,
        kind="T",
        paper="arXiv:2006.08217",
        memory="1",
        note="Matters where weights are scale-invariant (before a normalisation layer); else it is SGD.",
    ),
    "sgd_sai": Entry(
        rule=per_tensor.SgdSai,
        kind="T",
        paper="arXiv:2412.11768",
        memory="1 and one per tensor",
        note="Mostly a rate that grows with the tensor's size; clients disagree on it unless the server sets it.",
    ),
    "stable_spam": Entry(
        rule=per_tensor.StableSpam,
        kind="T",
        paper="arXiv:2502.17055",
        memory="2 and three per tensor",
        note="Its averages need hundreds of steps; within a round it is Adam on normalised gradients.",
    ),
    "lars": Entry(
        rule=per_tensor.Lars,
        kind="T",
        paper="arXiv:1708.03888",
        memory="1",
        note="For large batches; with small local batches the trust ratio follows the noise.",
    ),
    "lamb": Entry(
        rule=per_tensor.Lamb,
        kind="T",
        paper="arXiv:1904.00962",
        memory="2",
        note="For large batches; as a server rule it sees the low noise it was made for.",
    ),
    "auon": Entry(
        rule=per_tensor.AuOn,
        kind="T",
        paper="AuON 2025",
        memory="1",
        note="Expect normalised SGD: it coincides with it up to 1/2d per tensor.",
    ),
    "adafactor": Entry(
        rule=adafactor.Adafactor,
        kind="T",
        paper="arXiv:1804.04235",
        memory="rows + columns per matrix",
        note="Least memory of the adaptive rules; the step is relative to the weights' own size.",
    ),
    "adagrad_norm": Entry(
        rule=per_tensor.AdaGradNorm,
        kind="T",
        paper="arXiv:1806.01811",
        memory="one per client",
        note="SGD with a step size that a client's own gradient norms lower.",
    ),
    "muon": Entry(
        rule=matrix.Muon,
        kind="M",
        paper="Jordan et al. 2024; torch.optim.Muon",
        memory="1",
        note="Newton-Schulz costs many times a small batch's gradient: for large local batches, or on the server.",
    ),
    "hybrid_auon": Entry(
        rule=matrix.HybridAuOn,
        kind="M",
        paper="AuON 2025",
        memory="1",
        note="With one Newton-Schulz step it lies between normalised SGD and Muon, at a fifth of Muon's cost.",
    ),
    "galore": Entry(
        rule=galore.GaLore,
        kind="M",
        paper="arXiv:2403.03507",
        memory="(2 l r + s r) / (l s) per matrix",
        note="With fresh state each round one SVD per client and round; basis=randomized or dct_lowrank cost less.",
    ),
    "frugal": Entry(
        rule=frugal.Frugal,
        kind="E/M",
        paper="arXiv:2411.07837",
        memory="2 density; blocks 2; svd and its basis",
        note="With few local steps a quarter of the entries move like Adam, the others like sign descent.",
    ),
    "dct_lowrank": Entry(
        rule=dct.DctLowRank,
        kind="M",
        paper="arXiv:2505.17967",
        memory="2 r / s per matrix, with error feedback 1 more",
        note="One basis for all clients: the cheapest low-rank rule for many of them.",
    ),
    "sophia_g": Entry(
        rule=extra.SophiaG,
        kind="E/X",
        paper="arXiv:2305.14342",
        memory="2",
        note="Its curvature needs many refreshes: in a short round with fresh state nearly all is sign descent.",
    ),
    "sophia_h": Entry(
        rule=extra.SophiaH,
        kind="E/X",
        paper="arXiv:2305.14342",
        memory="2",
        note="As sophia_g, with a Hessian-vector product every few steps and no need of class labels.",
    ),
    "mezo": Entry(
        rule=elementwise.Sgd,
        kind="E/X",
        paper="arXiv:2305.17333",
        memory="0",
        note="Two losses a step and no gradient; many steps; a client's round is a list of scalars.",
        settings={"zeroth_order": {}},
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
