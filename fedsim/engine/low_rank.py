"""A whole local run of plain SGD without ever forming a client's weights: exact for chains of linear layers.

After some steps from a common W, client c's weights are W - lr * D' A, where the rows of A are the inputs that its
layer has seen and those of D the gradients at its outputs. So a client is its (A, D), which is far smaller than W as
long as it saw fewer samples than the layer is wide. The forward pass of all clients and all steps through the first
layer is one product with the common W, corrections go through the Gram matrix of a client's own inputs, and the
weighted sum of all clients' changes is one product again:

    z_k = (a_k) W' - lr * (a_k A') D            da_k = dz_k W - lr * (dz_k D') A            sum = lr * (w D)' A

A bias is a weight on a constant input 1, which adds 1 to the Gram matrix.

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
    """The chain that a module is, or None: Flatten, then Linear layers with one ReLU between any two."""
    if not isinstance(module, nn.Sequential):
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
class LowRankDelta:
    """The change (received minus local) of C clients in factors.

    Args:
        layout: of the vector.
        chain: the layers.
        lr: of the steps.
        inputs: A of each layer, [C, R, in].
        gradients: D of each layer, [C, R, out]; zero for samples that are padding.
    """

    layout: Layout
    chain: Chain
    lr: float
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.inputs[0])

    def dense(self) -> Tensor:
        """[C, P]."""
        out = self.inputs[0].new_zeros(len(self), self.layout.size)
        views = self.layout.views(out)
        for (weight, bias), a, d in zip(self.chain.layers, self.inputs, self.gradients, strict=True):
            views[weight].copy_(torch.bmm(d.mT * self.lr, a))
            if bias is not None:
                views[bias].copy_(d.sum(1) * self.lr)
        return out

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[P]: the sum over clients of weights [C] times their change; clients' own vectors are never formed."""
        out = self.inputs[0].new_zeros(self.layout.size)
        views = self.layout.views(out)
        factor = (self.lr * weights).to(out)[:, None, None]
        for (weight, bias), a, d in zip(self.chain.layers, self.inputs, self.gradients, strict=True):
            scaled = (d * factor).flatten(0, 1)
            torch.mm(scaled.mT, a.flatten(0, 1), out=views[weight])
            if bias is not None:
                torch.sum(scaled, 0, out=views[bias])
        return out


def low_rank_run(
    chain: Chain, layout: Layout, x: Tensor, whole: Batch, width: int, active: list[int], lr: float
) -> tuple[LowRankDelta, Tensor]:
    """K steps of plain SGD on C clients from one model.

    Args:
        chain: the module's layers.
        layout: of x.
        x: [P], where every client starts.
        whole: all minibatches side by side: inputs [C, K * width, ...], weights [C, K * width] or None.
        width: B of every step.
        active: for each step, how many of the first clients take it.
        lr: learning rate.

    Returns:
        (what the clients changed, sum of the losses of each client's steps [C]).
    """
    views = layout.views(x)
    weights = [views[w] for w, _ in chain.layers]
    biases = [None if b is None else views[b] for _, b in chain.layers]
    num_clients, samples = whole.targets.shape[:2]
    first = whole.inputs.flatten(2)
    a = [first] + [first.new_zeros(num_clients, samples, i) for _, i in chain.shapes[1:]]
    d = [first.new_zeros(num_clients, samples, o) for o, _ in chain.shapes]
    base = _shifted(first.flatten(0, 1) @ weights[0].mT, biases[0]).view(num_clients, samples, -1)
    losses = first.new_zeros(num_clients)
    for step, k in enumerate(active):
        now, past = slice(step * width, (step + 1) * width), slice(step * width)
        z = base[:k, now]
        for layer in range(len(weights)):
            if layer:
                a[layer][:k, now] = h = torch.relu(z)
                z = h @ weights[layer].mT
                z = _shifted(z, biases[layer])
            if step:
                gram = torch.bmm(a[layer][:k, now], a[layer][:k, past].mT)
                gram = gram if biases[layer] is None else gram.add_(1.0)
                z = torch.baddbmm(z, gram, d[layer][:k, past], alpha=-lr)
        shares = None if whole.weights is None else whole.weights[:k, now]
        loss, dz = loss_and_gradient(cross_entropy, z, whole.targets[:k, now], shares, 1)
        losses[:k] += loss
        for layer in range(len(weights) - 1, -1, -1):
            if layer:
                da = dz @ weights[layer]
                if step:
                    da = torch.baddbmm(da, torch.bmm(dz, d[layer][:k, past].mT), a[layer][:k, past], alpha=-lr)
            d[layer][:k, now] = dz
            if layer:
                dz = da.mul_(a[layer][:k, now] > 0)
    return LowRankDelta(layout, chain, lr, tuple(a), tuple(d)), losses


def _shifted(z: Tensor, bias: Tensor | None) -> Tensor:
    return z if bias is None else z.add_(bias)
