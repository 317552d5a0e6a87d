"""A whole local run of plain SGD without ever forming a client's weights: exact for chains of linear layers.

After some steps from W, client c's weights are W - lr * D' A, where the rows of A are the inputs that its layer has
seen and those of D the gradients at its outputs. So a client is its (A, D), which is far smaller than W as long as it
saw fewer samples than the layer is wide. The forward pass of all clients and all steps through the first layer is one
product with the common W, corrections go through the Gram matrix of a client's own inputs, and the weighted sum of all
clients' gradients is one product again:

    z_k = (a_k) W' - lr * (a_k A') D            da_k = dz_k W - lr * (dz_k D') A            sum = (w D)' A

A bias is a weight on a constant input 1, which adds 1 to the Gram matrix. Steps along scale * g + shift move W by
-lr * shift as well: what all clients share of it goes into W, what is a client's own costs one more product. A pull
towards W, along pull * (y - W), shrinks what earlier steps did by 1 - lr * pull: that is one number a step on D.

Letters: C clients, R samples of a client's local run, P entries; a layer has `in` inputs and `out` outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.engine.base import Batch
from fedsim.engine.head import loss_and_gradient
from fedsim.engine.losses import cross_entropy
from fedsim.params import Layout
from fedsim.task import Walk, reach
from fedsim.terms import Weight


@dataclass(frozen=True)
class Chain:
    """Linear layers with ReLU between them, found in a module.

    Args:
        layers: (name of the weight, name of the bias or None) of each linear layer, from input to output.
        shapes: (out, in) of each.
    """

    layers: tuple[tuple[str, str | None], ...]
    shapes: tuple[tuple[int, int], ...]

    def worthwhile(self, samples: int) -> bool:
        """Whether Gram matrices of so many samples cost less than half of what products with the weights do."""
        gram = sum(samples / 2 * (i + o) for o, i in self.shapes)
        return gram < 0.5 * sum(i * o for o, i in self.shapes)


def chain_of(module: nn.Module) -> Chain | None:
    """The chain that a module is, or None: Flatten, then Linear layers that train, with one ReLU between any two."""
    if not isinstance(module, nn.Sequential) or not all(p.requires_grad for p in module.parameters()):
        return None
    found = [(name, m) for name, m in module.named_modules() if not isinstance(m, nn.Sequential)]
    found = [(name, m) for name, m in found if not isinstance(m, nn.Flatten | nn.Identity)]
    linears, others = found[0::2], found[1::2]
    fits = all(isinstance(m, nn.Linear) for _, m in linears) and all(isinstance(m, nn.ReLU) for _, m in others)
    if not fits or len(linears) != len(others) + 1:
        return None
    layers, shapes = [], []
    for name, m in linears:
        assert isinstance(m, nn.Linear)
        layers.append((f"{name}.weight", None if m.bias is None else f"{name}.bias"))
        shapes.append((m.out_features, m.in_features))
    return Chain(tuple(layers), tuple(shapes))


@dataclass(frozen=True)
class LowRank:
    """Sums of the gradients of C clients in factors; see `fedsim.terms.Factors`.

    Args:
        layout: of the vector; the chain's layers are all of it.
        chain: the layers.
        inputs: A of each layer, [C, R, in].
        gradients: D of each layer, [C, R, out]; zero for samples that are padding.
    """

    layout: Layout
    chain: Chain
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    def dense(self, weight: Weight = 1.0) -> Tensor:
        """[C, P], times a weight."""
        first = self.inputs[0]
        factor = weight.to(first)[:, None, None] if isinstance(weight, Tensor) else weight
        out = first.new_empty(len(self), self.layout.size)
        views = self.layout.views(out)
        for (name, bias), a, d in zip(self.chain.layers, self.inputs, self.gradients, strict=True):
            d = d * factor
            torch.bmm(d.mT, a, out=views[name])
            if bias is not None:
                torch.sum(d, 1, out=views[bias])
        return out

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[P]: the sum over clients of weights [C] times their sums; clients' own vectors are never formed."""
        out = self.inputs[0].new_zeros(self.layout.size)
        views = self.layout.views(out)
        factor = weights.to(out)[:, None, None]
        for (name, bias), a, d in zip(self.chain.layers, self.inputs, self.gradients, strict=True):
            scaled = (d * factor).flatten(0, 1)
            torch.mm(scaled.mT, a.flatten(0, 1), out=views[name])
            if bias is not None:
                torch.sum(scaled, 0, out=views[bias])
        return out


def low_rank_run(
    chain: Chain,
    layout: Layout,
    x: Tensor,
    whole: Batch,
    width: int,
    active: list[int],
    walk: Walk,
) -> tuple[LowRank, Tensor]:
    """K steps from x on C clients.

    Args:
        chain: the module's layers.
        layout: of x.
        x: where clients start, [P] if they share it, else [C, P].
        whole: all minibatches side by side: inputs [C, K * width, ...], weights [C, K * width] or None.
        width: B of every step.
        active: for each step, how many of the first clients take it.
        walk: the steps.

    Returns:
        (sum of each client's gradients g, each times (1 - lr * pull)^(steps after it); sum of its losses [C]).
    """
    first, targets = _tensors(whole)
    start = gradients_at(chain, layout, x, whole, width, active)[0] if walk.less_start else None
    a, d, blocks = _room(chain, first, width) if start is None else _room_beside(start, width)
    shift, lr, pull = _shared(walk), walk.lr, walk.lr * walk.pull
    moved = x if shift is None else torch.empty_like(x)
    steps = _Steps(
        a=a,
        d=d,
        own=[(lr * weight, _layers(chain, layout, term)) for weight, term in walk.shift if term.ndim == 2],
        rate=lr * walk.scale,
        pull=pull,
        width=width,
        blocks=blocks,
        adds=walk.less_start,
    )
    losses = first.new_zeros(len(first))
    layers = _layers(chain, layout, x)
    # one product for all steps, where the first layer's common part stays what it is
    base = _times(first, layers[0], len(first)) if x.ndim == 1 and shift is None else None
    for step, k in enumerate(active):
        if step and shift is not None:
            layers = _layers(chain, layout, torch.sub(x, shift, alpha=lr * reach(step, pull), out=moved))
        z = steps.forward(layers, step, k, base)
        now = slice(step * width, (step + 1) * width)
        shares = None if whole.weights is None else whole.weights[:k, now]
        loss, dz = loss_and_gradient(cross_entropy, z, targets[:k, now], shares, 1)
        losses[:k] += loss
        steps.backward(layers, step, k, dz)
    return LowRank(layout, chain, tuple(steps.a), tuple(steps.d)), losses


def _shared(walk: Walk) -> Tensor | None:
    """[P]: the part of the shift that all clients share, None for nothing."""
    out = None
    for weight, term in walk.shift:
        if term.ndim == 1:
            out = weight * term if out is None else out.add_(weight * term)
    return out


def gradients_at(
    chain: Chain, layout: Layout, x: Tensor, whole: Batch, width: int, active: list[int]
) -> tuple[LowRank, Tensor]:
    """The gradients of all minibatches at one point x [P]: a run that goes nowhere, all of whose steps are one.

    Args:
        chain, layout, whole, width, active: see `low_rank_run`.
        x: the point.

    Returns:
        (sum of each client's gradients, sum of its losses [C]).
    """
    (first, targets), layers = _tensors(whole), _layers(chain, layout, x)
    num_clients = len(first)
    a, losses = [first], first.new_zeros(num_clients)
    for layer in layers[:-1]:
        a.append(torch.relu(_times(a[-1], layer, num_clients)))
    z = _times(a[-1], layers[-1], num_clients)
    dz = torch.zeros_like(z)
    for step, k in enumerate(active):
        now = slice(step * width, (step + 1) * width)
        shares = None if whole.weights is None else whole.weights[:k, now]
        loss, dz[:k, now] = loss_and_gradient(cross_entropy, z[:k, now], targets[:k, now], shares, 1)
        losses[:k] += loss
    d = [dz]
    for layer, h in zip(layers[:0:-1], a[:0:-1], strict=True):
        d.insert(0, _back(d[0], layer, num_clients).mul_(h > 0))
    return LowRank(layout, chain, tuple(a), tuple(d)), losses


def _tensors(whole: Batch) -> tuple[Tensor, Tensor]:
    """(inputs [C, R, in], classes [C, R]); chains have no other."""
    assert isinstance(whole.inputs, Tensor) and isinstance(whole.targets, Tensor)
    return whole.inputs.flatten(2), whole.targets


Room = tuple[list[Tensor], list[Tensor], list[int]]
"""(inputs, gradients, rows of a step) of each layer, to be filled step by step."""


def _room(chain: Chain, first: Tensor, width: int) -> Room:
    """Room for the factors of a run whose first layer sees `first` [C, R, in]."""
    a = [first, *(first.new_zeros(*first.shape[:2], i) for _, i in chain.shapes[1:])]
    return a, [first.new_zeros(*first.shape[:2], o) for o, _ in chain.shapes], [width] * len(a)


def _room_beside(start: LowRank, width: int) -> Room:
    """Room beside minus the gradients at the start; the first layer sees the same inputs, so there these are added."""
    a = [start.inputs[0], *(_beside(torch.zeros_like(rows), rows, width) for rows in start.inputs[1:])]
    d = [-start.gradients[0], *(_beside(torch.zeros_like(rows), -rows, width) for rows in start.gradients[1:])]
    return a, d, [width, *[2 * width] * (len(a) - 1)]


def _beside(own: Tensor, other: Tensor, width: int) -> Tensor:
    """[C, 2 R, n] from [C, R, n] twice: the rows of every step, and then the other ones of that step."""
    steps = own.shape[1] // width
    return torch.cat([t.unflatten(1, (steps, width)) for t in (own, other)], dim=2).flatten(1, 2)


@dataclass(frozen=True)
class _Steps:
    """The factors as they grow, step by step; `a` and `d` are those of `LowRank`.

    Args:
        own: (learning rate times weight, layers) of each term of the shift that is a client's own.
        rate: by which gradients move the weights.
        pull: by which a step takes back what earlier ones did.
        width: B of every step.
        blocks: rows of every step in each layer's factors, of which the first B are the step's own.
        adds: whether the first layer's rows hold what the step's gradients are added to.
    """

    a: list[Tensor]
    d: list[Tensor]
    own: list[tuple[float, list[Layer]]]
    rate: float
    pull: float
    width: int
    blocks: list[int]
    adds: bool

    def rows(self, i: int, step: int) -> tuple[slice, slice]:
        """(rows of a step's own, rows of earlier steps) in the factors of layer i."""
        start = step * self.blocks[i]
        return slice(start, start + self.width), slice(start)

    def forward(self, layers: list[Layer], step: int, k: int, base: Tensor | None) -> Tensor:
        """The first k clients' logits [k, B, classes]; `base` holds the first layer's products of all steps, if any."""
        h = self.a[0][:k, self.rows(0, step)[0]]
        for i, layer in enumerate(layers):
            now, past = self.rows(i, step)
            z = _times(h, layer, k) if i or base is None else base[:k, now]
            if step:
                for rate, term in self.own:
                    z = z.sub_(_times(h, term[i], k), alpha=rate * reach(step, self.pull))
                gram = torch.bmm(h, self.a[i][:k, past].mT)
                gram = gram if layer[1] is None else gram.add_(1.0)
                z = torch.baddbmm(z, gram, self.d[i][:k, past], alpha=-self.rate)
            if i + 1 < len(layers):
                self.a[i + 1][:k, self.rows(i + 1, step)[0]] = h = torch.relu(z)
        return z

    def backward(self, layers: list[Layer], step: int, k: int, dz: Tensor) -> None:
        """Notes the gradients at every layer's outputs, from those at the logits dz [k, B, classes]."""
        for i in range(len(layers) - 1, -1, -1):
            now, past = self.rows(i, step)
            self.d[i][:k, now] = self.d[i][:k, now] + dz if self.adds and not i else dz
            if i:
                da = _back(dz, layers[i], k)
                if step:
                    for rate, term in self.own:
                        da = da.sub_(_back(dz, term[i], k), alpha=rate * reach(step, self.pull))
                    gram = torch.bmm(dz, self.d[i][:k, past].mT)
                    da = torch.baddbmm(da, gram, self.a[i][:k, past], alpha=-self.rate)
                dz = da.mul_(self.a[i][:k, now] > 0)
            if self.pull and step:
                self.d[i][:k, past] *= 1 - self.pull


Layer = tuple[Tensor, Tensor | None]
"""(weight, bias or None) of a layer: [out, in] and [out], with a client axis in front where clients have their own."""


def _layers(chain: Chain, layout: Layout, x: Tensor) -> list[Layer]:
    views = layout.views(x)
    return [(views[w], None if b is None else views[b]) for w, b in chain.layers]


def _times(a: Tensor, layer: Layer, k: int) -> Tensor:
    """a W' + b for the first k clients, [k, B, out]."""
    weight, bias = layer
    if weight.ndim == 2:
        z = (a.flatten(0, 1) @ weight.mT).view(*a.shape[:2], -1)
        return z if bias is None else z.add_(bias)
    z = torch.bmm(a, weight[:k].mT)
    return z if bias is None else z.add_(bias[:k, None])


def _back(dz: Tensor, layer: Layer, k: int) -> Tensor:
    """dz W, [k, B, in]."""
    weight = layer[0]
    return dz @ weight if weight.ndim == 2 else torch.bmm(dz, weight[:k])
