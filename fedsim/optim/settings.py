"""What an optimizer has beside its rules: where the gradient comes from, its transforms, averages and back end.

Letters: k clients, P coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from fedsim.config import did_you_mean
from fedsim.optim.rule import Count, Fixed, Share, Within
from fedsim.optim.schedules import Schedule
from fedsim.params import ROLES, Layout


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Bounds on each client's gradient, applied in this order (transforms.py); none by default.

    Args:
        value: every entry is clamped to [-value, value].
        adaptive: each matrix row's norm stays below this times the norm of the same row of x (AGC).
        tensor: bound on the norm of each tensor.
        norm: bound on the norm over all tensors of a client (`global` in the file).
    """

    value: float | None = None
    adaptive: float | None = None
    tensor: float | None = None
    norm: float | None = None

    def __post_init__(self) -> None:
        for name, bound in vars(self).items():
            if bound is not None and not bound > 0:
                key = "global" if name == "norm" else name
                raise ValueError(f"{key} must be positive, got {bound!r}; leave it out to not clip")

    @property
    def whole_rows(self) -> bool:
        """Whether some bound looks at more than one coordinate."""
        return any(v is not None for v in (self.adaptive, self.tensor, self.norm))


@dataclass(frozen=True, kw_only=True)
class PerpGrad:
    """The perpendicular-gradient transform.

    Args:
        rescale: restore the gradient's norm, as the authors' file does.
    """

    rescale: bool = True


@dataclass(frozen=True, kw_only=True)
class Average:
    """Averaging of the weights after each step, and what is sent is the average.

    Args:
        name: `ema` (average = decay * average + (1 - decay) * x) or `swa` (running mean).
        decay: of `ema`, one number or one per client.
    """

    name: Literal["ema", "swa"] = "ema"
    decay: Share = 0.999


@dataclass(frozen=True, kw_only=True)
class ZerothOrder:
    """The gradient from losses alone: g = mean over z of (loss(x + eps z) - loss(x - eps z)) / (2 eps) * z.

    Malladi et al. Fine-tuning language models with just forward passes (MeZO). arXiv:2305.17333. Both losses are taken
    on one batch, without dropout; z is standard normal, keyed by client, step and coordinate, so a step is known from
    its number and one scalar per direction. Departure: x is not perturbed in place, which would drift by rounding.

    Args:
        eps: how far the losses are apart.
        directions: how many z a step averages over, two losses each.
    """

    eps: Annotated[float, Within(1e-30, float("inf"))] = 1e-3
    directions: Count = 1


@dataclass(frozen=True, kw_only=True)
class Private:
    """The private gradient: g = (sum_i g_i * min(1, clip / (norm(g_i) + 1e-6)) + noise * clip * z) / expected batch.

    Abadi et al. Deep learning with differential privacy (DP-SGD). arXiv:1607.00133. The norm is over all of a client's
    tensors. The noise is keyed by client and step. Sampling and the privacy account are not the optimizer's.

    Args:
        clip: bound on the norm of a sample's gradient; or {role or tensor name: bound}, each for the norms of its own
            tensors one by one, every tensor having one. The noise then goes with the root of the sum of their squares.
        noise: the noise multiplier sigma; 0 for none.
        batch_size: what to divide by (the expected size under Poisson sampling); without it, the batch's own size.
    """

    clip: float | Mapping[str, float]
    noise: Fixed = 0.0
    batch_size: float | None = None

    def __post_init__(self) -> None:
        bounds = tuple(self.clip.values()) if isinstance(self.clip, Mapping) else (self.clip,)
        for bound in bounds:
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
                raise ValueError(f"clip must be positive, got {bound!r}; take .inf to not clip")
        if self.batch_size is not None and not self.batch_size > 0:
            raise ValueError(f"batch_size must be positive, got {self.batch_size!r}")
        if self.noise > 0 and any(bound == float("inf") for bound in bounds):
            raise ValueError("noise is relative to clip, which is infinite; give a bound or no noise")

    def bounds(self, layout: Layout) -> tuple[float, ...]:
        """One number for all tensors together, or one per tensor; a tensor's name counts more than its role.

        Raises:
            ValueError: a tensor without a bound, or a name that no tensor has.
        """
        if not isinstance(self.clip, Mapping):
            return (self.clip,)
        for key in self.clip:
            if key not in (known := (*ROLES, *layout.names)):
                raise ValueError(f"clip: unknown role or tensor {key!r}{did_you_mean(str(key), known)}")
        found = [
            self.clip.get(name, self.clip.get(role)) for name, role in zip(layout.names, layout.roles, strict=True)
        ]
        lacking = [name for name, bound in zip(layout.names, found, strict=True) if bound is None]
        if lacking:
            raise ValueError(f"clip has no bound for {', '.join(lacking)}; name them or their roles")
        return tuple(bound for bound in found if bound is not None)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an optimizer has beside its rules.

    Args:
        clip: bounds on the gradient; that on the norm of all of it is written `global`.
        perp_grad: remove the gradient's part along the weights.
        average: average the weights.
        lr_mult, wd_mult: {role or tensor name: factor} on the learning rate and the weight decay; a name counts more
            than a role. Factors on the learning rate scale the decoupled decay too, as in torch's parameter groups.
        schedule: factor on the learning rate over rounds, steps or the fraction of the training that is done.
        state_scope: `round` (state is fresh each round), `client` (kept by the client) or `server` (sent down with the
            model and averaged back). Data for the training loop; the step is the same.
        zeroth_order: take the gradient from losses alone, at points around x.
        dp: clip the samples' gradients and add noise (DP-SGD).
        state_dtype: how the rule's large states are kept: `fp32`, `bf16`, or `dyn8` (8-bit codes in blocks).
        backend: `eager`, `fused` (torch's own kernel), `compiled` (one pass of C++; on a GPU torch.compile), or `auto`:
            the first of C++, torch's kernel and eager that can take the step. A step that a named one cannot take is
            eager.
        skip_nonfinite: leave out the step of a client whose gradient is not finite, and count it.
    """

    clip: Clip = Clip()
    perp_grad: PerpGrad | None = None
    average: Average | None = None
    lr_mult: Mapping[str, float] | None = None
    wd_mult: Mapping[str, float] | None = None
    schedule: Schedule | None = None
    zeroth_order: ZerothOrder | None = None
    dp: Private | None = None
    state_scope: Literal["round", "client", "server"] = "round"
    state_dtype: Literal["fp32", "bf16", "dyn8"] = "fp32"
    backend: Literal["auto", "eager", "fused", "compiled"] = "auto"
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        if self.zeroth_order is not None and self.dp is not None:
            raise ValueError("zeroth_order and dp both say where the gradient comes from; keep one")

    @property
    def gradient_need(self) -> str:
        """What the training loop must supply for the gradient."""
        if self.zeroth_order is not None:
            return "loss_eval"
        return "grad" if self.dp is None else "per_sample_norms"
