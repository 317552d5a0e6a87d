"""Byzantine clients that train on poisoned data: flipped labels, and a back door that a trigger opens.

Backdoor: Gu, Dolan-Gavitt, Garg. BadNets. arXiv:1708.06733; model replacement: Bagdasaryan, Veit, Hua, Estrin,
Shmatikov. How to backdoor federated learning. AISTATS 2020. Label flip with the attackers' mean is ByzFL's, where
however the flipped gradients are those of the honest clients' data.

Letters: H honest clients, b byzantine ones, P entries of a vector; t [P] the mean of what the byzantine ones trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.sim.byzantine import Knowledge
from fedsim.streams import Streams
from fedsim.trees import Tree


@dataclass(frozen=True, kw_only=True)
class LabelFlip:
    """Trains on labels num_classes - 1 - y and sends what comes of it, as an honest client would.

    Args:
        pooled: each sends the mean of what all byzantine clients trained, instead of its own.
        share: of a byzantine client's samples whose labels are flipped, the same ones in every step.
    """

    pooled: bool = False
    share: float = 1.0
    on_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share("label_flip", self.share)

    def wanted(self, inputs: Tree, targets: Tensor, num_classes: int) -> tuple[Tree, Tensor]:
        """The samples as they are, with labels counted from the other end."""
        return inputs, num_classes - 1 - targets

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        assert known.own is not None
        return known.own.mean(dim=0).expand(b, -1) if self.pooled else known.own


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """Trains some images with a patch in the corner as if they were of another class, and sends what comes of it.

    Rows then have `test_attack_success`: of held-out images of other classes the share that is taken for the wanted
    one once they carry the patch.

    Args:
        target: the class that the patch shall stand for.
        size: rows and columns of the patch, at the lower right.
        value: of its pixels, in the units of the inputs.
        share: of a byzantine client's samples that carry it, the same ones in every step.
    """

    target: int = 0
    size: int = 3
    value: float = 1.0
    share: float = 0.5
    on_data: ClassVar[bool] = True
    name: ClassVar[str] = "backdoor"

    def __post_init__(self) -> None:
        _check_share(self.name, self.share)
        if self.target < 0 or self.size < 1 or not isfinite(self.value):
            raise ValueError(
                f"{self.name}: target must be a class, size at least 1 pixel and value finite, got "
                f"target={self.target}, size={self.size}, value={self.value}"
            )

    def wanted(self, inputs: Tree, targets: Tensor, num_classes: int) -> tuple[Tree, Tensor]:
        """Images [..., channels, height, width] with the patch, and labels of the wanted class.

        Raises:
            ValueError: for samples that are no images, or too small, and for a class that there is not.
        """
        pixels = inputs.shape[targets.ndim :] if isinstance(inputs, Tensor) and inputs.is_floating_point() else ()
        if not isinstance(inputs, Tensor) or len(pixels) != 3 or min(pixels[1:]) < self.size:
            found = f"{pixels[1]} x {pixels[2]} pixels" if len(pixels) == 3 else "no image"
            raise ValueError(
                f"{self.name} writes a patch of {self.size} x {self.size} pixels into images, and a sample of this "
                f"task is {found}; choose another attack or size"
            )
        if self.target >= num_classes:
            raise ValueError(f"{self.name}.target={self.target} is none of the {num_classes} classes")
        patched = inputs.clone()
        patched[..., -self.size :, -self.size :] = self.value
        return patched, torch.full_like(targets, self.target)

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        return known.own


@dataclass(frozen=True, kw_only=True)
class ModelReplacement(Backdoor):
    """A back door whose clients scale what they send so that an even mean of all becomes t, whatever honest ones do.

    All send ((H + b) t - H mu) / b, where mu [P] is the honest mean; one that did not know it would leave out what
    the honest ones add, which is little once they agree.
    """

    name: ClassVar[str] = "model_replacement"

    def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor | None:
        assert known.own is not None
        if not b:
            return known.own
        n = len(honest) + b
        return ((n * known.own.mean(dim=0) - honest.sum(dim=0)) / b).expand(b, -1)


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name}.share must be a share of the samples, above 0 and at most 1, got {share}")
