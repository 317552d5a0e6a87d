"""Weighted sums of per-sample gradients whose weights follow from the gradients' own norms, in one pass.

After one forward and one backward pass each layer has its inputs a and the gradients d at its outputs, sample by
sample. That is enough for the norm of a sample's gradient: norm(a)^2 norm(d)^2 for a linear layer, over a sequence the
sum over pairs of positions of (a . a')(d . d'). Once all norms are known, each layer forms its weighted sum from the
same two tensors; no second backward pass is made, since d grows with its sample's weight. Where the gradient of one
sample is smaller than its Gram matrices (convolutions), it is formed, measured and forgotten.

Goodfellow. Efficient per-example gradient computations. arXiv:1510.01799.
Li, Tramer, Liang, Hashimoto. arXiv:2110.05679 (sequences, embeddings).

Letters: C clients, B samples, T positions or pixels, L tensors; I inputs and O outputs of a layer, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.engine.base import Batch
from fedsim.engine.head import End, Head
from fedsim.engine.images import Conv2d, channels_last
from fedsim.engine.norms import BatchNorm, GroupNorm, LayerNorm
from fedsim.engine.ops import Bound, Embedding, Linear, Op, Spec, aten
from fedsim.engine.per_sample import CHUNK, Each, Outer, Part, Rows, outer_square_norms
from fedsim.engine.recurrent import LSTM
from fedsim.engine.stacked import TapeSession
from fedsim.engine.tape import Tape


class GhostSink:
    """Takes what every layer leaves of its samples' gradients; products and sums over samples are not wanted."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """See `Sink`."""

    def tensor(self, name: str, grad: Tensor) -> None:
        """See `Sink`."""

    def part(self, name: str, part: Part) -> None:
        """A parameter's gradients by one use of it; those of a parameter used twice are formed and added."""
        before = self.parts.get(name)
        self.parts[name] = part if before is None else Each(before.formed() + part.formed())


def leave(bound: Bound, name: str, part: Part) -> None:
    """Hand a part to the sink of the present pass."""
    assert isinstance(bound.sink, GhostSink)
    bound.sink.part(name, part)


def by_client(value: Tensor, bound: Bound) -> Tensor:
    """[C, B, ...] also where C = 1."""
    return value if bound.lead else value.unsqueeze(0)


class GhostLinear(Linear):
    """See `Linear`."""

    def backward(self, dz: Tensor) -> tuple[Tensor | None]:
        samples = self.shape[self.lead]
        deltas, inputs = (
            by_client(v.flatten(self.lead, -2), self.bound).unflatten(1, (samples, -1)) for v in (dz, self.x)
        )
        leave(self.bound, self.spec.params[0], Outer(deltas, inputs))
        if self.bias is not None:
            leave(self.bound, self.spec.params[1], Each(deltas.sum(2)))
        return super().backward(dz)


class GhostEmbedding(Embedding):
    """See `Embedding`."""

    def backward(self, dy: Tensor) -> tuple[None]:
        layer = self.spec.layer
        assert isinstance(layer, nn.Embedding)
        index, deltas = by_client(self.index, self.bound), by_client(dy, self.bound)
        index, deltas = index.reshape(*index.shape[:2], -1), deltas.reshape(*deltas.shape[:2], -1, dy.shape[-1])
        if layer.padding_idx is not None:
            deltas = deltas * (index != layer.padding_idx)[..., None]
        leave(self.bound, self.spec.params[0], Rows(deltas, index, layer.num_embeddings))
        return (None,)


class Kernels:
    """A convolution's weights, from its images and the gradients [C, B, O, H, W] at its outputs."""

    def __init__(self, op: GhostConv2d, deltas: Tensor) -> None:
        self.op, self.deltas = op, deltas

    def square_norms(self) -> Tensor:
        found = [
            torch.stack([outer_square_norms(d, w) for d, w in zip(*piece, strict=True)]).sum(0)
            for piece in self._pieces()
        ]
        return torch.cat(found).view(self.deltas.shape[:2])

    def formed(self) -> Tensor:
        found = [torch.cat([d.mT @ w for d, w in zip(*piece, strict=True)], 1) for piece in self._pieces()]
        return torch.cat(found).view(*self.deltas.shape[:2], *self.op.weight.shape[-4:])

    def add_(self, view: Tensor, factors: Tensor) -> None:
        view += self.op.weight_gradient(self.deltas * factors[..., None, None, None])

    def _pieces(self) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """(gradients [n, T, O], windows [n, T, I]) of some samples, each a tuple over the layer's groups."""
        op = self.op
        stride, padding, dilation = (tuple(n) for n in op.settings)
        kernel = tuple(op.weight.shape[-2:])
        pixels, window = self.deltas.shape[-2:].numel(), op.weight.shape[-3:].numel() * op.groups
        each = max(1, CHUNK // (pixels * window))
        for images, deltas in zip(op.images(), self.deltas, strict=True):
            for x, d in zip(images.split(each), deltas.split(each), strict=True):
                windows = F.unfold(x, kernel, dilation, padding, stride)
                yield d.flatten(2).mT.chunk(op.groups, -1), windows.mT.chunk(op.groups, -1)


class GhostConv2d(Conv2d):
    """See `Conv2d`."""

    def backward(self, dy: Tensor) -> tuple[Tensor | None]:
        deltas = by_client(dy, self.bound)
        leave(self.bound, self.spec.params[0], Kernels(self, deltas))
        if self.bias is not None:
            leave(self.bound, self.spec.params[1], Each(deltas.sum((-2, -1))))
        return (self._derivative(dy, 0) if self.spec.needs[0] else None,)

    def weight_gradient(self, deltas: Tensor) -> Tensor:
        """[C, *] from deltas [C, B, O, H, W]."""
        return by_client(self._derivative(deltas if self.bound.lead else deltas[0], 1), self.bound)

    def images(self) -> list[Tensor]:
        """[B, Ch, H, W] of each client."""
        if not self._as_groups(self.x[0]):
            return self.x
        return list(self.x[0].unflatten(1, (len(self.weight), -1)).transpose(0, 1))

    def _as_groups(self, x: Tensor) -> bool:
        return bool(self.bound.lead) and x.is_cuda

    def _derivative(self, dy: Tensor, which: int) -> Tensor:
        """By the images (0) or by the weights (1)."""
        if self._as_groups(dy):
            clients, weight = len(dy), self.weight.flatten(0, 1)
            flat = dy.transpose(0, 1).flatten(1, 2)
            found = self._derivative_of(flat, self.x[0], weight, clients * self.groups, which)
            return found.view(self.weight.shape) if which else found.unflatten(1, (clients, -1)).transpose(0, 1)
        if not self.bound.lead:
            return self._derivative_of(dy, self.x[0], self.weight, self.groups, which)
        rows = zip(dy, self.x, self.weight, strict=True)
        return torch.stack([self._derivative_of(*row, self.groups, which) for row in rows])

    def _derivative_of(self, dy: Tensor, x: Tensor, weight: Tensor, groups: int, which: int) -> Tensor:
        wanted = [which == 0, which == 1, False]
        settings = (*self.settings, False, [0, 0], groups, wanted)
        found = aten.convolution_backward.default(channels_last(dy), x, weight, None, *settings)[which]
        assert found is not None
        return found


class GhostLSTM(LSTM):
    """See `LSTM`."""

    def _product(self, name: str, left: Tensor, right: Tensor) -> None:
        samples = self.bound.batch.inputs.shape[1]
        deltas, inputs = (
            by_client(v, self.bound).unflatten(1, (-1, samples)).transpose(1, 2) for v in (left.mT, right)
        )
        leave(self.bound, name, Outer(deltas, inputs))
        layer = next(names for names in self.layers if name in names)
        if name == layer[0]:
            for bias in layer[2:]:
                leave(self.bound, bias, Each(deltas.sum(2)))


class GhostLayerNorm(LayerNorm):
    """See `LayerNorm`."""

    def forward(self, *inputs: Tensor) -> Tensor:
        self.x = inputs[0]
        return super().forward(*inputs)

    def backward(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer = self.spec.layer
        assert isinstance(layer, nn.LayerNorm)
        shape = layer.normalized_shape
        y = F.layer_norm(self.x, shape, eps=layer.eps)
        _leave_affine(self.spec, self.bound, y, dy, lambda v: v.reshape(*v.shape[:2], -1, *shape).sum(2))
        return super().backward(dy)


class GhostGroupNorm(GroupNorm):
    """See `GroupNorm`."""

    def forward(self, *inputs: Tensor) -> Tensor:
        self.x = inputs[0]
        return super().forward(*inputs)

    def backward(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer = self.spec.layer
        assert isinstance(layer, nn.GroupNorm)
        images = self.x.flatten(0, self.bound.lead).contiguous()
        y = F.group_norm(images, layer.num_groups, eps=layer.eps).view(self.x.shape)
        _leave_affine(self.spec, self.bound, y, dy, lambda v: v.reshape(*v.shape[:3], -1).sum(3))
        return super().backward(dy)


def _leave_affine(spec: Spec, bound: Bound, y: Tensor, dy: Tensor, add_up: Callable[[Tensor], Tensor]) -> None:
    """The scale and the shift of normalised values y, from the gradients dy at what they become."""
    for name, grads in zip(spec.params, (dy * y, dy), strict=False):
        leave(bound, name, Each(add_up(by_client(grads, bound))))


GHOSTS: dict[Callable[..., Op], Callable[..., Op]] = {
    Linear: GhostLinear,
    Embedding: GhostEmbedding,
    Conv2d: GhostConv2d,
    LSTM: GhostLSTM,
    LayerNorm: GhostLayerNorm,
    GroupNorm: GhostGroupNorm,
}


class GhostSession(TapeSession):
    """A tape bound to a stack x [C, P] for sums of per-sample gradients; in float32 or wider, without BatchNorm."""

    def weighted_sum(self, batch: Batch, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """The sum over each client's samples of their gradients, tensor by tensor times a weight.

        Args:
            batch: of the C clients; the gradient of padding is zero.
            weigh: [C, B, L] weights from the squared norms [C, B, L] of samples' gradients, in the layout's order.

        Returns:
            ([C, P], mean loss [C]), or None where the module has no tape, or one with a layer unknown here.
        """
        if not self._prepare(batch):
            return None
        layout, sink = self.engine.layout, GhostSink()
        self.bound.sink = sink
        loss = self._run(batch)
        # the pass was that of the mean loss, so gradients came divided by the number of samples
        count = batch.targets.new_tensor(batch.targets.shape[1]) if batch.weights is None else batch.weights.sum(1)
        count = count.to(self.x).view(-1, 1, 1)
        names = layout.trainable.names
        absent = self.x.new_zeros(batch.targets.shape[:2])
        norms = [sink.parts[name].square_norms() if name in sink.parts else absent for name in names]
        weights = weigh(torch.stack(norms, -1) * count.square()) * count
        total = self.x.new_zeros(self.x.shape)
        views = layout.views(total)
        for j, name in enumerate(names):
            if name in sink.parts:
                sink.parts[name].add_(views[name], weights[..., j])
        return total, loss

    def _prepare(self, batch: Batch) -> bool:
        if not super()._prepare(batch):
            return False
        assert self._tape is not None
        specs = self._tape.specs
        if any(spec.make is BatchNorm or (spec.params and spec.make not in GHOSTS) for spec in specs):
            return False
        return True

    def _bind(self, tape: Tape) -> tuple[list[Op], End]:
        ops = [GHOSTS.get(spec.make, spec.make)(spec, self.bound) for spec in tape.specs]
        return ops, Head(self.engine.loss, self.lead, tape.result)
