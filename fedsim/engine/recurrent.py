"""Stacked LSTM and GRU with their backward passes through time written out.

Input products of all steps are one product, and so are the gradients of both weight matrices: only the recurrent
product and the gates stay in the loop over positions. Gates in torch's order: i, f, g, o and r, z, n.

Letters: C clients, B samples, T positions, E inputs, H hidden units, G gates. Values are [C, B, T, .], or [B, T, .] if
C = 1.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fedsim.engine.factors import Outer, Small
from fedsim.engine.ops import Bound, Spec, by_client


class Recurrent:
    """A layer from zero states: [.., B, T, E] -> [.., B, T, H]. Its final states are not to be read."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        layer = spec.layer
        assert isinstance(layer, nn.LSTM | nn.GRU)
        self.spec, self.bound, self.lead = spec, bound, bound.lead
        each = 4 if layer.bias else 2
        self.layers = [spec.params[i : i + each] for i in range(0, len(spec.params), each)]

    def steps(self, pre: Tensor, hs: Tensor, w_hh_t: Tensor, biases: list[Tensor]) -> tuple[Tensor, ...]:
        """Fills in the hidden states.

        Args:
            pre: [.., T, B, G H], the input products, to be overwritten.
            hs: [.., T + 1, B, H], of which the first are zero.
            w_hh_t: [.., H, G H], as products take it.
            biases: [.., 1, G H] of inputs and of hidden states, or none.

        Returns:
            What `steps_back` needs.
        """
        raise NotImplementedError

    def steps_back(self, dy: Tensor, hs: Tensor, w_hh: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        """[.., T, B, G H] gradients of both products, from those of the hidden states [.., T, B, H]."""
        raise NotImplementedError

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

    def low(self, t: Tensor) -> Tensor:
        """As products take it."""
        return t.bfloat16() if self.bound.low else t

    def _layer(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        lead = self.lead
        w_ih, w_hh, *biases = (self.bound.views[name] for name in names)
        steps = x.movedim(-2, lead).contiguous()  # [.., T, B, E]
        pre = torch.matmul(self.low(steps.flatten(lead, -2)), self.low(w_ih.mT)).to(x.dtype)
        pre = pre.view(*steps.shape[:-1], -1)
        hs = x.new_zeros(*steps.shape[:lead], x.shape[-2] + 1, steps.shape[-2], w_hh.shape[-1])
        self.saved.append((steps, hs, *self.steps(pre, hs, self.low(w_hh.mT), [b.unsqueeze(-2) for b in biases])))
        return hs.narrow(lead, 1, x.shape[-2]).movedim(lead, -2)

    def _layer_backward(self, dy: Tensor, index: int, need: bool) -> Tensor | None:
        lead, sink, names = self.lead, self.bound.sink, self.layers[index]
        steps, hs, *kept = self.saved[index]
        w_ih, w_hh = self.bound.views[names[0]], self.bound.views[names[1]]
        found = self.steps_back(dy.movedim(-2, lead), hs, self.low(w_hh), *kept)
        of_inputs, of_hidden = ((d, d.flatten(lead, -2)) for d in found)  # and [.., T B, G H]
        deltas, dx = self.low(of_inputs[1]), None
        if need:
            dx = torch.matmul(deltas, self.low(w_ih)).to(dy.dtype).view(steps.shape).movedim(lead, -2)
        before, samples = hs.narrow(lead, 0, steps.shape[lead]).flatten(lead, -2), steps.shape[lead + 1]
        pairs = ((deltas, steps.flatten(lead, -2)), (self.low(of_hidden[1]), before))
        for name, (outputs, inputs) in zip(names, pairs, strict=False):
            sink.take(name, Outer(outputs, self.low(inputs), samples, positions_first=True))
        for name, (each, flat) in zip(names[2:], (of_inputs, of_hidden), strict=False):
            sink.take(name, Small(partial(flat.sum, -2), partial(by_client(each, lead).sum, 1)))
        return dx


class LSTM(Recurrent):
    """nn.LSTM."""

    def steps(self, pre: Tensor, hs: Tensor, w_hh_t: Tensor, biases: list[Tensor]) -> tuple[Tensor, ...]:
        lead, hidden = self.lead, hs.shape[-1]
        if biases:
            pre += (biases[0] + biases[1]).unsqueeze(lead)
        cs, tanh_cs = torch.zeros_like(hs), torch.empty_like(hs)
        for t in range(pre.shape[lead]):
            z = pre.select(lead, t)
            z += torch.matmul(self.low(hs.select(lead, t)), w_hh_t)
            i, f, g, o = z.chunk(4, -1)
            z[..., : 2 * hidden].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            c = cs.select(lead, t + 1)
            torch.addcmul(i * g, f, cs.select(lead, t), out=c)
            tanh_c = torch.tanh(c, out=tanh_cs.select(lead, t + 1))
            torch.mul(o, tanh_c, out=hs.select(lead, t + 1))
        return pre, cs, tanh_cs

    def steps_back(self, dy: Tensor, hs: Tensor, w_hh: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        lead, (gates, cs, tanh_cs) = self.lead, kept
        dz = torch.empty_like(gates)
        dh, dc = torch.zeros_like(hs.select(lead, 0)), torch.zeros_like(hs.select(lead, 0))
        for t in reversed(range(gates.shape[lead])):
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
            dh = torch.matmul(self.low(dz.select(lead, t)), w_hh).to(dz.dtype)
        return dz, dz


class GRU(Recurrent):
    """nn.GRU."""

    def steps(self, pre: Tensor, hs: Tensor, w_hh_t: Tensor, biases: list[Tensor]) -> tuple[Tensor, ...]:
        lead, hidden = self.lead, hs.shape[-1]
        if biases:
            pre += biases[0].unsqueeze(lead)
        inner = torch.empty_like(hs.narrow(lead, 1, pre.shape[lead]))  # the hidden state's part of n
        for t in range(pre.shape[lead]):
            h = hs.select(lead, t)
            product = torch.matmul(self.low(h), w_hh_t).to(pre.dtype)
            if biases:
                product += biases[1]
            gates = pre.select(lead, t)
            gates[..., : 2 * hidden].add_(product[..., : 2 * hidden]).sigmoid_()
            r, z, n = gates.chunk(3, -1)
            inside = inner.select(lead, t).copy_(product[..., 2 * hidden :])
            n.addcmul_(r, inside).tanh_()
            torch.lerp(n, h, z, out=hs.select(lead, t + 1))
        return pre, inner

    def steps_back(self, dy: Tensor, hs: Tensor, w_hh: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        lead, (gates, inner) = self.lead, kept
        of_inputs, of_hidden = torch.empty_like(gates), torch.empty_like(gates)
        dh = torch.zeros_like(hs.select(lead, 0))
        for t in reversed(range(gates.shape[lead])):
            h, (r, z, n) = hs.select(lead, t), gates.select(lead, t).chunk(3, -1)
            dr, dz, dn = of_inputs.select(lead, t).chunk(3, -1)
            dh = dh + dy.select(lead, t)
            torch.mul(dh * (1 - z), 1 - n * n, out=dn)
            torch.mul(dh * (h - n), z * (1 - z), out=dz)
            torch.mul(dn * inner.select(lead, t), r * (1 - r), out=dr)
            product = of_hidden.select(lead, t).copy_(of_inputs.select(lead, t))
            product.chunk(3, -1)[2].mul_(r)
            dh = dh * z + torch.matmul(self.low(product), w_hh).to(dh.dtype)
        return of_inputs, of_hidden
