"""Parameter layout: one flat vector per client, and named views into it.

Letters: C clients in a stack, P entries of one client's vector. A stack of clients is one tensor [C, P];
`Layout.views` shows it as {name: [C, *shape]} without copying. Trainable parameters come first; buffers
(BatchNorm's running statistics) follow them, so that they are averaged, sent and counted like anything else
while optimizers work on the first `num_trainable` entries alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

ROLES = ("matrix", "vector", "embed", "head")


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the tensors in a flat vector.

    Args:
        names: one per tensor; trainable parameters first, buffers last.
        shapes: of each tensor, without the client axis.
        roles: `matrix` (2-D or more, hidden), `vector` (1-D or less), `embed` or `head`, one per tensor.
        num_buffers: how many of the last tensors are buffers, which no optimizer touches.

    >>> layout = Layout.of({"w": (2, 3), "b": (2,)})
    >>> layout.size, layout.offsets
    (8, (0, 6))
    >>> {k: tuple(v.shape) for k, v in layout.views(torch.zeros(5, 8)).items()}
    {'w': (5, 2, 3), 'b': (5, 2)}
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    roles: tuple[str, ...]
    num_buffers: int = 0

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """A layout of trainable tensors, whose roles follow from their shapes."""
        roles = tuple("matrix" if len(s) >= 2 else "vector" for s in shapes.values())
        return cls(tuple(shapes), tuple(tuple(s) for s in shapes.values()), roles)

    @classmethod
    def of_module(cls, module: nn.Module) -> Layout:
        """The layout of a module's parameters, then its buffers.

        Parameters with `requires_grad=False` are kept with the buffers: they travel, and are never trained.
        The last matrix is the `head`; weights of `nn.Embedding` are `embed`.
        """
        embeds = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
        kept = {k: p for k, p in module.named_parameters() if not p.requires_grad} | dict(module.named_buffers())
        roles = ["embed" if id(p) in embeds else "matrix" if p.ndim >= 2 else "vector" for p in trained.values()]
        matrices = [i for i, role in enumerate(roles) if role == "matrix"]
        if len(matrices) > 1:
            roles[matrices[-1]] = "head"
        tensors = trained | kept
        return cls(
            names=tuple(tensors),
            shapes=tuple(tuple(t.shape) for t in tensors.values()),
            roles=(*roles, *("vector" for _ in kept)),
            num_buffers=len(kept),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each tensor."""
        return tuple(prod(s) for s in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the flat vector."""
        starts, at = [], 0
        for n in self.sizes:
            starts.append(at)
            at += n
        return tuple(starts)

    @cached_property
    def size(self) -> int:
        """P, the length of the flat vector, buffers included."""
        return sum(self.sizes)

    @cached_property
    def num_trainable(self) -> int:
        """How many of the first entries an optimizer may change."""
        return sum(self.sizes[: len(self.sizes) - self.num_buffers])

    @cached_property
    def trainable(self) -> Layout:
        """The same layout without its buffers: what an optimizer sees."""
        if not self.num_buffers:
            return self
        n = len(self.names) - self.num_buffers
        return Layout(self.names[:n], self.shapes[:n], self.roles[:n])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views {name: [..., *shape]} into flat [..., P]; writing to one writes to the other."""
        assert flat.shape[-1] == self.size, f"expected {self.size} entries, got {flat.shape[-1]}"
        return {
            name: flat.narrow(-1, start, size).unflatten(-1, shape) if shape else flat[..., start]
            for name, start, size, shape in zip(self.names, self.offsets, self.sizes, self.shapes, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `views`: {name: [*lead, *shape]} -> [*lead, P], float32, a copy."""
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            t = tensors[name]
            lead = t.shape[: t.ndim - len(shape)]
            parts.append(t.reshape(*lead, -1).to(torch.float32))
        return torch.cat(parts, dim=-1)

    def state_dict(self, flat: Tensor, like: nn.Module) -> dict[str, Tensor]:
        """A module's state dict from a flat [P], in the module's own dtypes: views of it, save for other dtypes."""
        own = dict(like.named_parameters()) | dict(like.named_buffers())
        return {
            k: (v.round() if not own[k].is_floating_point() else v).to(own[k].dtype)
            for k, v in self.views(flat.detach()).items()
        }


def program_of(module: nn.Module) -> nn.Module:
    """A copy of a module to be called with other tensors in place of its parameters, which it shares."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def on_device(module: nn.Module, device: torch.device | str) -> nn.Module:
    """`program_of` a module, on a device; one that lies elsewhere keeps its own parameters there."""
    elsewhere = any(p.device != torch.device(device) for p in module.parameters())
    return copy.deepcopy(module).to(device) if elsewhere else program_of(module).to(device)
