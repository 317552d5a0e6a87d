"""The table of rules: name -> class, paper, memory and one honest line; and which of them low-rank rules may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsim.optim.rule import Rule
from fedsim.optim.rules import (
    adafactor,
    adam_kin,
    adaptive,
    dct,
    frugal,
    galore,
    matrix,
    momentum,
    norms,
    projected,
    schedule_free,
    sophia,
    spam,
)


@dataclass(frozen=True)
class Entry:
    """One named rule.

    Args:
        rule: its class.
        paper: where it is from.
        memory: numbers kept per parameter, beside the parameter and its gradient; as text when it depends.
        note: what a user with few local steps should know, in one line.
        preset: hyper-parameters that this name stands for.
        settings: settings of the whole optimizer (`settings.Settings`) that it stands for.
    """

    rule: type[Rule]
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

    @property
    def kind(self) -> str:
        """Letters: E elementwise, T a few numbers per tensor, M matrix products, X more than one gradient a step."""
        return {"coordinate": "E", "tensor": "T", "matrix": "M"}[self.rule.reach] + "/X" * (self.needs != {"grad"})


RULES: dict[str, Entry] = {
    "sgd": Entry(
        momentum.Sgd,
        "torch.optim.SGD; Sutskever et al. ICML 2013",
        "0, with momentum 1",
        "The baseline that every federated analysis assumes; hard to beat with few local steps.",
    ),
    "adam": Entry(
        adaptive.Adam,
        "arXiv:1412.6980",
        "2, with amsgrad 3",
        "With fresh state and few local steps it is close to sign descent.",
    ),
    "adamw": Entry(
        adaptive.Adam,
        "arXiv:1711.05101",
        "2, with amsgrad 3",
        "With fresh state and few local steps it is close to sign descent with decay.",
        preset={"decay": "decoupled", "weight_decay": 0.01},
    ),
    "amsgrad": Entry(
        adaptive.Adam,
        "arXiv:1904.09237",
        "3",
        "The running maximum has little to remember within one round.",
        preset={"amsgrad": True},
    ),
    "adamw_hf": Entry(
        adaptive.Adam,
        "arXiv:1711.05101, the transformers library's form",
        "2",
        "Raw eps and decay after the step; the base of GaLore and SPAM.",
        preset={"eps_mode": "raw", "eps": 1e-6, "decay": "decoupled_after"},
    ),
    "lion": Entry(
        momentum.Lion,
        "arXiv:2302.06675, arXiv:2310.05898",
        "1",
        "Every entry moves by lr, so take it 3 to 10 times smaller than Adam's and the decay as much larger.",
    ),
    "adagrad": Entry(
        adaptive.Adagrad,
        "JMLR 12 (2011) 2121",
        "1",
        "Its first step is a sign step; as a server rule it is FedAdagrad.",
    ),
    "rmsprop": Entry(
        adaptive.RmsProp,
        "Tieleman, Hinton 2012; torch.optim.RMSprop",
        "1 to 3",
        "No bias correction: with fresh state the first steps are 1/sqrt(1-alpha) times too long.",
    ),
    "nadam": Entry(
        adaptive.NAdam,
        "Dozat 2016; torch.optim.NAdam",
        "2",
        "Adam with Nesterov momentum; the same remark on few local steps holds.",
    ),
    "radam": Entry(
        adaptive.RAdam,
        "arXiv:1908.03265",
        "2",
        "With beta2=0.999 its first five steps are plain momentum, often the whole round.",
    ),
    "yogi": Entry(
        adam_kin.Yogi,
        "NeurIPS 2018 (Zaheer et al.)",
        "2",
        "Large eps makes it tamer than Adam; as a server rule it is FedYogi.",
    ),
    "adabelief": Entry(
        adam_kin.AdaBelief,
        "arXiv:2010.07468",
        "2, with amsgrad 3",
        "Long steps where gradients agree with their mean; few local steps give it little mean to believe.",
    ),
    "diffgrad": Entry(
        adam_kin.DiffGrad,
        "arXiv:1909.11015",
        "3",
        "Steady or tiny gradients halve the step; otherwise close to Adam.",
    ),
    "adan": Entry(
        adam_kin.Adan,
        "arXiv:2208.06677",
        "4",
        "Slow averages (0.98, 0.92, 0.99): within one round it is close to its first gradients.",
    ),
    "lion_k": Entry(
        momentum.LionK,
        "arXiv:2310.05898",
        "1",
        "Lion with another geometry; not every kappa was in the authors' experiments.",
    ),
    "spam": Entry(
        spam.Spam,
        "arXiv:2501.06842",
        "2",
        "Its interval of 500 never comes within a round: use state_scope client, or set interval.",
    ),
    "spam_sparse": Entry(
        spam.SparseSpam,
        "arXiv:2501.06842",
        "3",
        "Moments on a random part of each matrix; dense here, so it saves no memory in simulation.",
    ),
    "signsgd": Entry(
        momentum.SignSgd,
        "arXiv:1802.04434",
        "0",
        "Every entry moves by lr, whatever the gradient's size.",
    ),
    "signum": Entry(
        momentum.Signum,
        "arXiv:1802.04434",
        "1",
        "Sign of a running mean; the mean is mostly the first gradient in a short round.",
    ),
    "optimistic": Entry(
        momentum.Optimistic,
        "arXiv:1311.1869",
        "1",
        "For games and min-max tasks; on plain minimisation no better than SGD.",
    ),
    "eg": Entry(
        momentum.ExponentiatedGradient,
        "Cornford et al. 2024",
        "0",
        "Weights keep their sign and zeros stay zero, so initialise accordingly.",
    ),
    "sgld": Entry(
        momentum.Sgld,
        "ICML 2011 (Welling, Teh)",
        "0",
        "A sampler: noise is keyed by client and step; averaging clients averages the noise away.",
    ),
    "sghmc": Entry(
        momentum.Sghmc,
        "arXiv:1402.4102",
        "1",
        "A sampler with momentum; see sgld.",
    ),
    "schedule_free_sgd": Entry(
        schedule_free.ScheduleFreeSgd,
        "arXiv:2405.15682",
        "1",
        "Clients must send the average x (Optimizer.final), not y; its weights start anew each round.",
    ),
    "schedule_free_adamw": Entry(
        schedule_free.ScheduleFreeAdamW,
        "arXiv:2405.15682",
        "2",
        "Clients must send the average x (Optimizer.final), not y; its weights start anew each round.",
    ),
    "adamp": Entry(
        projected.AdamP,
        "arXiv:2006.08217",
        "2",
        "Matters where weights are scale-invariant (before a normalisation layer); else it is AdamW.",
    ),
    "sgdp": Entry(
        projected.SgdP,
        "arXiv:2006.08217",
        "1",
        "Matters where weights are scale-invariant (before a normalisation layer); else it is SGD.",
    ),
    "sgd_sai": Entry(
        norms.SgdSai,
        "arXiv:2412.11768",
        "1 and one per tensor",
        "Mostly a rate that grows with the tensor's size; clients disagree on it unless the server sets it.",
    ),
    "stable_spam": Entry(
        norms.StableSpam,
        "arXiv:2502.17055",
        "2 and three per tensor",
        "Its averages need hundreds of steps; within a round it is Adam on normalised gradients.",
    ),
    "lars": Entry(
        norms.Lars,
        "arXiv:1708.03888",
        "1",
        "For large batches; with small local batches the trust ratio follows the noise.",
    ),
    "lamb": Entry(
        norms.Lamb,
        "arXiv:1904.00962",
        "2",
        "For large batches; as a server rule it sees the low noise it was made for.",
    ),
    "auon": Entry(
        norms.AuOn,
        "AuON 2025",
        "1",
        "Expect normalised SGD: it coincides with it up to 1/2d per tensor.",
    ),
    "adafactor": Entry(
        adafactor.Adafactor,
        "arXiv:1804.04235",
        "rows + columns per matrix",
        "Least memory of the adaptive rules; the step is relative to the weights' own size.",
    ),
    "adagrad_norm": Entry(
        norms.AdaGradNorm,
        "arXiv:1806.01811",
        "one per client",
        "SGD with a step size that a client's own gradient norms lower.",
    ),
    "muon": Entry(
        matrix.Muon,
        "Jordan et al. 2024; torch.optim.Muon",
        "1",
        "Newton-Schulz costs many times a small batch's gradient: for large local batches, or on the server.",
    ),
    "hybrid_auon": Entry(
        matrix.HybridAuOn,
        "AuON 2025",
        "1",
        "With one Newton-Schulz step it lies between normalised SGD and Muon, at a fifth of Muon's cost.",
    ),
    "galore": Entry(
        galore.GaLore,
        "arXiv:2403.03507",
        "(2 l r + s r) / (l s) per matrix",
        "With fresh state each round one SVD per client and round; basis=randomized or dct_lowrank cost less.",
    ),
    "frugal": Entry(
        frugal.Frugal,
        "arXiv:2411.07837",
        "2 density; blocks 2; svd and its basis",
        "With few local steps a quarter of the entries move like Adam, the others like sign descent.",
    ),
    "dct_lowrank": Entry(
        dct.DctLowRank,
        "arXiv:2505.17967",
        "2 r / s per matrix, with error feedback 1 more",
        "One basis for all clients: the cheapest low-rank rule for many of them.",
    ),
    "sophia_g": Entry(
        sophia.SophiaG,
        "arXiv:2305.14342",
        "2",
        "Its curvature needs many refreshes: in a short round with fresh state nearly all is sign descent.",
    ),
    "sophia_h": Entry(
        sophia.SophiaH,
        "arXiv:2305.14342",
        "2",
        "As sophia_g, with a Hessian-vector product every few steps and no need of class labels.",
    ),
    "mezo": Entry(
        momentum.Sgd,
        "arXiv:2305.17333",
        "0",
        "Two losses a step and no gradient; many steps; a client's round is a list of scalars.",
        settings={"zeroth_order": {}},
    ),
}

INNER = ("adam", "adamw_hf", "amsgrad", "sgd", "lion", "rmsprop", "adagrad")
"""The elementwise rules that a low-rank rule may hold inside."""
