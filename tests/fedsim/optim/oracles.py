"""Runs a rule on a stack and an ordinary optimizer client by client, on the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.optim import build
from fedsim.params import Layout

LAYOUT = Layout.of({"w": (8, 16), "b": (8,), "v": (4, 8)})
Maker = Callable[[list[nn.Parameter]], Any]


def problem(steps: int = 7, clients: int = 3, seed: int = 0, layout: Layout = LAYOUT) -> tuple[Tensor, Tensor]:
    """x [C, P] and gradients [steps, C, P], float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(clients, layout.size, generator=generator, dtype=torch.float64)
    return x, torch.randn(steps, clients, layout.size, generator=generator, dtype=torch.float64)


def stack_run(
    spec: Mapping[str, Any], x: Tensor, grads: Tensor, layout: Layout = LAYOUT, final: bool = False
) -> Tensor:
    """The stack after one step per gradient."""
    optimizer = build(spec, layout)
    x = x.clone()
    state = optimizer.init(x)
    for g in grads:
        optimizer.step_(x, g, state)
    return optimizer.final(x, state) if final else x


def state_bytes(spec: Mapping[str, Any], layout: Layout = LAYOUT) -> int:
    """Bytes of one client's state, with parameters in float32."""
    state = build(spec, layout).init(torch.zeros(1, layout.size, device="meta"))
    return sum(b.numel() * b.element_size() for b in state.buffers.values())


def client_runs(make: Maker, x: Tensor, grads: Tensor, layout: Layout = LAYOUT) -> Tensor:
    """The same by C separate ordinary optimizers."""
    rows = []
    for c in range(len(x)):
        params = [nn.Parameter(v.clone()) for v in layout.views(x[c]).values()]
        optimizer = make(params)
        for g in grads:
            for p, v in zip(params, layout.views(g[c]).values(), strict=True):
                p.grad = v.clone()
            optimizer.step()
        rows.append(torch.cat([p.detach().reshape(-1) for p in params]))
    return torch.stack(rows)


def error(make: Maker, spec: Mapping[str, Any], steps: int = 7, layout: Layout = LAYOUT) -> float:
    """Largest difference between the two, in float64."""
    x, grads = problem(steps, layout=layout)
    ours, theirs = stack_run(spec, x, grads, layout), client_runs(make, x, grads, layout)
    return float((ours - theirs).abs().max())
