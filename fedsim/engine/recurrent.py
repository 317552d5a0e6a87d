"""Stacked LSTM with its backward pass through time written out.

Input products of all steps are one product, and so are the gradients of both weight matrices: only the recurrent
product and the gates stay in the loop over positions. Gates in torch's order i, f, g, o.

Letters: C clients, B samples, T positions, E inputs, H hidden units. Values are [C, B, T, .], or [B, T, .] if C = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.engine.factors import Outer, Small
from fedsim.engine.ops import Bound, Spec, by_client


class LSTM:
    """nn.LSTM from zero states, batch first: [.., B, T, E] -> [.., B, T, H]. Its final states are not to be read."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        layer = spec.layer
        assert isinstance(layer, nn.LSTM)
        self.spec, self.bound = spec, bound
        each = 4 if layer.bias else 2
        self.layers = [spec.params[i : i + each] for i in range(0, len(spec.params), each)]

    def forward(self, x: Tensor) -> Tensor:
        self.saved: list[tuple[Tensor, ...]] = []
        for names in self.layers:
            x = self._layer(x, names)
        return x

    def backward(self, dy: Tensor) -> tuple[Tensor | None]:
        grad: Tensor | None = dy
        for i in reversed(range(len(self.layers))):
            assert grad is not None
            grad = self._layer_backward(grad, i, need=i > 0 or self.spec.needs[0])
        return (grad,)

    def _layer(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        lead, views = self.bound.lead, self.bound.views
        w_ih, w_hh = views[names[0]], views[names[1]]
        length = x.shape[-2]
        steps = x.movedim(-2, lead).contiguous()  # [.., T, B, E]
        pre = torch.matmul(self._low(steps.flatten(lead, -2)), self._low(w_ih.mT)).to(x.dtype)
        if len(names) == 4:
            pre += (views[names[2]] + views[names[3]]).unsqueeze(-2)
        gates = pre.view(*steps.shape[:-1], -1)  # [.., T, B, 4H], overwritten by the activations
        hidden = w_hh.shape[-1]
        hs = x.new_zeros(*steps.shape[:lead], length + 1, steps.shape[-2], hidden)
        cs = torch.zeros_like(hs)
        tanh_cs = torch.empty_like(hs)
        w_hh_t = self._low(w_hh.mT)
        for t in range(length):
            z = gates.select(lead, t)
            z += torch.matmul(self._low(hs.select(lead, t)), w_hh_t)
            i, f, g, o = z.chunk(4, -1)
            z[..., : 2 * hidden].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            c = cs.select(lead, t + 1)
            torch.addcmul(i * g, f, cs.select(lead, t), out=c)
            tanh_c = torch.tanh(c, out=tanh_cs.select(lead, t + 1))
            torch.mul(o, tanh_c, out=hs.select(lead, t + 1))
        self.saved.append((steps, gates, hs, cs, tanh_cs))
        return hs.narrow(lead, 1, length).movedim(lead, -2)

    def _layer_backward(self, dy: Tensor, index: int, need: bool) -> Tensor | None:
        lead, sink, names = self.bound.lead, self.bound.sink, self.layers[index]
        steps, gates, hs, cs, tanh_cs = self.saved[index]
        w_ih, w_hh = self.bound.views[names[0]], self.bound.views[names[1]]
        length = steps.shape[lead]
        dy = dy.movedim(-2, lead)
        dz = torch.empty_like(gates)
        dh, dc = torch.zeros_like(hs.select(lead, 0)), torch.zeros_like(hs.select(lead, 0))
        w_low = self._low(w_hh)
        for t in reversed(range(length)):
            i, f, g, o = gates.select(lead, t).chunk(4, -1)
            di, df, dg, do = dz.select(lead, t).chunk(4, -1)
            tanh_c = tanh_cs.select(lead, t + 1)
            dh = dh + dy.select(lead, t)
            dc = dc + dh * o * (1 - tanh_c * tanh_c)
            torch.mul(dh * tanh_c, o * (1 - o), out=do)
            torch.mul(dc * g, i * (1 - i), out=di)
            torch.mul(dc * cs.select(lead, t), f * (1 - f), out=df)
            torch.mul(dc * i, 1 - g * g, out=dg)
            dc = dc * f
            dh = torch.matmul(self._low(dz.select(lead, t)), w_low).to(dz.dtype)
        flat = dz.flatten(lead, -2)  # [.., T B, 4H]
        deltas, dx = self._low(flat), None
        if need:
            dx = torch.matmul(deltas, self._low(w_ih)).to(dz.dtype).view(steps.shape).movedim(lead, -2)
        before, samples = hs.narrow(lead, 0, length).flatten(lead, -2), steps.shape[lead + 1]
        for name, inputs in zip(names, (steps.flatten(lead, -2), before), strict=False):
            sink.take(name, Outer(deltas, self._low(inputs), samples, positions_first=True))
        for name in names[2:]:
            sink.take(name, Small(lambda: flat.sum(-2), lambda: by_client(dz, lead).sum(1)))
        return dx

    def _low(self, t: Tensor) -> Tensor:
        return t.bfloat16() if self.bound.low else t
