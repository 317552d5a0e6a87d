"""Parameter layout: one flat vector per client, and named views into it.

Letters: C clients in a stack, P entries of one client's vector. A stack of clients is one tensor [C, P];
`Layout.views` shows it as {name: [C, *shape]} without copying. Trainable parameters come first; buffers
(BatchNorm's running statistics) follow them, so that they are averaged, sent and counted like anything else
while optimizers work on the first `num_trainable` entries alone. What is frozen is no part of the vector: it stays in
the module, of which every worker has one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import accumulate
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
        norms: names of those that belong to normalisation layers.

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
    norms: tuple[str, ...] = ()

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """A layout of trainable tensors, whose roles follow from their shapes."""
        roles = tuple("matrix" if len(s) >= 2 else "vector" for s in shapes.values())
        return cls(tuple(shapes), tuple(tuple(s) for s in shapes.values()), roles)

    @classmethod
    def of_module(cls, module: nn.Module) -> Layout:
        """The layout of a module's parameters that train, then of the buffers that go with them (`moving_buffers`).

        Parameters with `requires_grad=False` are no part of it: whoever runs the module has them.
        The module's last matrix is the `head`, unless it is frozen or the only one; weights of `nn.Embedding` are
        `embed`. A normalisation layer is one whose class is called so (`BatchNorm2d`, `RMSNorm`).
        """
        embeds = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
        kept = moving_buffers(module)
        roles = ["embed" if id(p) in embeds else "matrix" if p.ndim >= 2 else "vector" for p in trained.values()]
        matrices = [k for k, p in module.named_parameters() if p.ndim >= 2 and id(p) not in embeds]
        if len(matrices) > 1 and matrices[-1] in trained:
            roles[list(trained).index(matrices[-1])] = "head"
        tensors = trained | kept
        norms = {
            f"{path}.{name}" if path else name
            for path, m in module.named_modules()
            if "norm" in type(m).__name__.lower()
            for name, _ in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))
        }
        return cls(
            names=tuple(tensors),
            shapes=tuple(tuple(t.shape) for t in tensors.values()),
            roles=(*roles, *("vector" for _ in kept)),
            num_buffers=len(kept),
            norms=tuple(name for name in tensors if name in norms),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each tensor."""
        return tuple(prod(s) for s in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the flat vector."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

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

    @cached_property
    def last_layer(self) -> tuple[str, ...]:
        """Names of the head's layer, its bias included; none where it is frozen or all that trains."""
        heads = [name for name, role in zip(self.names, self.roles, strict=True) if role == "head"]
        found = tuple(n for n in self.names for head in heads if n.rpartition(".")[0] == head.rpartition(".")[0])
        return found if len(found) < len(self.names) else ()

    def part(self, names: Collection[str]) -> Layout:
        """The layout of some of the tensors, in the order in which they stand here."""
        kept = [i for i, name in enumerate(self.names) if name in names]
        return Layout(
            names=tuple(self.names[i] for i in kept),
            shapes=tuple(self.shapes[i] for i in kept),
            roles=tuple(self.roles[i] for i in kept),
            num_buffers=sum(i >= len(self.names) - self.num_buffers for i in kept),
            norms=tuple(name for name in self.norms if name in names),
        )

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
        """A module's whole state dict, with what trained from a flat [P] and what is frozen as the module has it.

        Tensors have the module's own dtypes. Those of that dtype already are views, but for a second name of one.
        """
        trained, seen = self.views(flat.detach()), set[str]()
        first = {id(t): k for k, t in (*like.named_parameters(), *like.named_buffers())}
        out = {}
        for key, own in like.state_dict(keep_vars=True).items():
            if not isinstance(own, Tensor):  # extra state, which is no tensor
                continue
            name = first[id(own)]
            value = trained.get(name, own.detach())
            value = (value if own.is_floating_point() else value.round()).to(own.dtype)
            out[key] = value.clone() if name in seen else value
            seen.add(name)
        return out


@dataclass(frozen=True)
class Split:
    """A flat vector in two parts: entries that are shared, and entries that are a client's own.

    Letters: Q entries are shared and H are own, P = Q + H.

    Args:
        layout: of the whole vector.
        names: of the tensors that are own.

    >>> split = Split(Layout.of({"body": (2,), "head": (1,), "tail": (1,)}), ("head",))
    >>> v = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> split.shared(v).tolist(), split.own(v).tolist(), split.joined(split.shared(v), split.own(v)).tolist()
    ([1.0, 2.0, 4.0], [3.0], [1.0, 2.0, 3.0, 4.0])
    """

    layout: Layout
    names: tuple[str, ...]

    @classmethod
    def matching(cls, layout: Layout, patterns: Sequence[str]) -> Split:
        """The tensors whose names match one of the patterns (`head.*`, as in a shell) are own.

        Raises:
            ValueError: for a pattern that matches nothing.
        """
        return cls(layout, matching(layout.names, patterns, "entry of the model; its entries"))

    @cached_property
    def shared_layout(self) -> Layout:
        """Of the Q shared entries."""
        return self.layout.part(set(self.layout.names) - set(self.names))

    def shared(self, v: Tensor) -> Tensor:
        """[..., P] -> [..., Q], a copy."""
        return torch.cat([v[..., :0], *(v[..., span] for own, span in self._spans if not own)], dim=-1)

    def own(self, v: Tensor) -> Tensor:
        """[..., P] -> [..., H], a copy."""
        return torch.cat([v[..., :0], *(v[..., span] for own, span in self._spans if own)], dim=-1)

    def joined(self, shared: Tensor, own: Tensor) -> Tensor:
        """[..., Q] and [..., H] -> [..., P]; leading axes are broadcast."""
        lead = torch.broadcast_shapes(shared.shape[:-1], own.shape[:-1])
        parts, at = (shared.expand(*lead, -1), own.expand(*lead, -1)), [0, 0]
        out = []
        for is_own, span in self._spans:
            start, length = at[is_own], span.stop - span.start
            out.append(parts[is_own].narrow(-1, start, length))
            at[is_own] += length
        return torch.cat(out, dim=-1)

    @cached_property
    def _spans(self) -> tuple[tuple[bool, slice], ...]:
        """(whether own, where) of neighbouring tensors that go the same way."""
        spans: list[tuple[bool, slice]] = []
        for name, start, size in zip(self.layout.names, self.layout.offsets, self.layout.sizes, strict=True):
            own = name in self.names
            first = spans.pop()[1].start if spans and spans[-1][0] == own else start
            spans.append((own, slice(first, start + size)))
        return tuple(spans)


def matching(names: Sequence[str], patterns: Sequence[str], what: str) -> tuple[str, ...]:
    """The names that match one of the patterns (`head.*`, as in a shell).

    Args:
        names: in the order in which they are returned.
        patterns: every one has to match something.
        what: the names are, for the message, such as "entry of the model; its entries".

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{pattern!r} of {list(patterns)} matches no {what} are {shown}")
    return tuple(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def moving_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that go with a module's parameters.

    Not among them are those that are no part of the state dict (`persistent=False`: positions, masks), and those of
    frozen layers. A layer is frozen if it has parameters none of which trains; one without parameters goes with the
    nearest module around it that has some.
    """
    saved = module.state_dict(keep_vars=True).keys()
    return {k: b for k, b in module.named_buffers() if k in saved and _trains(module, k)}


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that stay in the module: what `Layout.of_module` leaves out."""
    kept = {k: p for k, p in module.named_parameters() if not p.requires_grad}
    moving = moving_buffers(module)
    return kept | {k: b for k, b in module.named_buffers() if k not in moving}


def _trains(module: nn.Module, buffer: str) -> bool:
    """Whether something trains in the layer that a buffer belongs to."""
    path = buffer
    while path:
        path = path.rpartition(".")[0]
        parameters = list(module.get_submodule(path).parameters())
        if parameters:
            return any(p.requires_grad for p in parameters)
    return False


def program_of(module: nn.Module) -> nn.Module:
    """A copy of a module to be called with other tensors in place of its parameters, which it shares."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def on_device(module: nn.Module, device: torch.device | str) -> nn.Module:
    """`program_of` a module, on a device; one that lies elsewhere keeps its own parameters there."""
    elsewhere = any(p.device != torch.device(device) for p in module.parameters())
    return copy.deepcopy(module).to(device) if elsewhere else program_of(module).to(device)


def trained(module: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a module with the parameters and buffers of a flat vector x [P], in evaluation mode."""
    return filled(copy.deepcopy(module), Layout.of_module(module).state_dict(x.cpu(), module))


def filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with these tensors as its state dict, in evaluation mode.

    Raises:
        ValueError: if they are those of another module.
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    wrong = sorted(k for k in {*own, *tensors} if k not in own or k not in tensors or own[k].shape != tensors[k].shape)
    if wrong:
        raise ValueError(f"the tensors are not those of {type(module).__name__}: {', '.join(wrong[:4])} don't fit")
    module.load_state_dict(tensors, strict=False)  # what it holds beside tensors stays
    return module.eval()
