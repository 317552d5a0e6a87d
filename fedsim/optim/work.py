"""What a step needs, gathered before it runs: coefficients on the host in float64, states, inputs, weight vectors.

When all clients agree on counter and hyper-parameters, a coefficient is a Python number; else it is computed per
client, cast once and moved to the device in one transfer as [k, 1].

Letters: k clients that step, P coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.pipeline import Block, Part, Plan, Values
from fedsim.optim.rule import Named
from fedsim.optim.state import OptState
from fedsim.streams import Streams


def assemble(
    plan: Plan,
    x: Tensor,
    state: OptState,
    *,
    lr_scale: float | Tensor,
    aux: Mapping[str, Tensor],
    streams: Streams | None,
) -> tuple[Block, dict[str, Any]]:
    """States, inputs and coefficients of the next step of x's k clients, and the host numbers after it."""
    k = x.shape[0]
    counter = state.t[:k].numpy()
    t: Any = int(counter[0]) + 1 if (counter == counter[0]).all() else counter + 1
    scale = lr_scale if isinstance(lr_scale, float | int) else lr_scale.double().cpu().numpy()[:k]
    block = Block(_shared(plan, x, state, t, aux), [], [])
    host: dict[str, Any] = {}
    for part in plan.parts:
        h = hypers(part, k, scale)
        q = Named({n: _agreed(state.host[part.name + n][:k].numpy()) for n in part.rule.host})
        coefs = dict(part.rule.coefficients(h, t, q))
        host |= {part.name + n: getattr(q, n) for n in part.rule.host}
        coefs |= {"lr": h.lr} | ({"decay_rate": decay_rate(part, h, scale)} if part.decays else {})
        block.coefs.append(_on_device(coefs, x))
        inputs = _inputs(part, x, counter + 1, aux, streams)
        block.states.append({**own_states(part, state, k), **part.constants(x), **inputs})
    return block, host


def hypers(part: Part, k: int, lr_scale: float | np.ndarray) -> Named:
    """The rule's hyper-parameters, `lr` and `weight_decay` for k clients, numbers or [k] float64."""
    if part.plain_hypers is not None:
        h = Named(part.plain_hypers)
    else:
        names = [f.name for f in fields(part.rule)]  # type: ignore[arg-type]
        h = Named({n: _rows(part, n, getattr(part.rule, n), k) for n in names})
        h.lr = _rows(part, "lr", part.base.lr, k)
        h.weight_decay = _rows(part, "weight_decay", part.base.weight_decay, k)
    h.lr = h.lr * lr_scale
    return h


def own_states(part: Part, state: OptState, k: int) -> dict[str, Tensor]:
    """A part's states under their own names, the first k rows."""
    buffers = {s.name: state.buffers[part.name + s.name] for s in part.states}
    return buffers if k == state.num_clients else {n: b[:k] for n, b in buffers.items()}


def named_states(part: Part, state: OptState, x: Tensor) -> Named:
    """The rule's own states of x's k clients."""
    s = Named(own_states(part, state, x.shape[0]))
    if part.storage is not None:
        part.storage.decode_(s, x)
    return s


def _rows(part: Part, name: str, value: Any, k: int) -> Any:
    if not isinstance(value, tuple):
        return value
    if len(value) < k:
        raise ValueError(
            f"{part.label}.{name} has {len(value)} numbers for a stack of {k} clients; give one per client"
        )
    return np.array(value[:k])


def decay_rate(part: Part, h: Named, scale: float | np.ndarray) -> Any:
    """What multiplies x: lambda, lambda times the learning rate, or lambda times the schedule alone."""
    mode = part.base.decay
    if mode in ("l2", "in_update"):
        return h.weight_decay
    return h.weight_decay * (scale if mode == "independent" else h.lr)


def _agreed(values: np.ndarray) -> Any:
    return float(values[0]) if (values == values[0]).all() else values


def _on_device(coefs: Mapping[str, Any], x: Tensor) -> Values:
    """Numbers stay numbers, arrays [k] become tensors [k, 1] in one transfer."""
    arrays = {n: v for n, v in coefs.items() if isinstance(v, np.ndarray)}
    if not arrays:
        return dict(coefs)
    columns = (
        torch.from_numpy(np.stack([v.astype(np.float64) for v in arrays.values()]))
        .to(x.dtype)
        .to(x.device)
        .unsqueeze(2)
        .unbind(0)
    )
    return {**coefs, **dict(zip(arrays, columns, strict=True))}


def _shared(plan: Plan, x: Tensor, state: OptState, t: Any, aux: Mapping[str, Tensor]) -> Values:
    """Mask, additive term and weight average, where present."""
    if aux:
        known = {"mask", "add"}.union(*(part.rule.inputs for part in plan.parts))
        known |= {plan.settings.gradient_need} - {"grad"}
        for name in aux:
            if name not in known:
                raise ValueError(f"aux {name!r} is no input of this optimizer, which takes {', '.join(sorted(known))}")
    shared: Values = {n: torch.atleast_2d(aux[n]).to(x.dtype) for n in ("mask", "add") if n in aux}
    average = plan.settings.average
    if average is None:
        return shared
    k = x.shape[0]
    values: dict[str, Any] = {"average_rate": 1 / t}
    if average.name == "ema":
        values["average_rate"] = 1 - (
            average.decay if isinstance(average.decay, float) else np.array(average.decay)[:k]
        )
        if np.any(t == 1):
            values["average_first"] = np.where(t == 1, 1.0, 0.0) if np.ndim(t) else 1.0
    return shared | _on_device(values, x) | {"average": state.buffers["average"][:k]}


def _inputs(part: Part, x: Tensor, t: np.ndarray, aux: Mapping[str, Tensor], streams: Streams | None) -> Values:
    """The extra tensors a rule declared; None for one that was not supplied this time."""
    for name in sorted(part.rule.wanted(t) & set(part.rule.inputs)):
        if name not in aux:
            raise ValueError(f"{part.label} needs aux[{name!r}] at this step; ask Optimizer.wanted before each")
    inputs: Values = {}
    for name in part.rule.active_inputs(t):
        value = aux.get(name)
        if name == "noise":
            inputs[name] = _noise(part, x, t, streams)
            continue
        picks = value is not None and part.columns is not None and value.shape[-1] == x.shape[1]
        inputs[name] = value[..., part.constants(x)["columns"]] if picks and value is not None else value
    return inputs


def _noise(part: Part, x: Tensor, t: np.ndarray, streams: Streams | None) -> Tensor:
    """[k, p] standard normal, keyed by client, job and the client's own step."""
    if streams is None:
        raise ValueError(f"{part.label} draws noise: pass streams=... to step_")
    noise = x.new_empty(x.shape[0], sum(part.segments.sizes))
    for step in np.unique(t):
        rows = torch.from_numpy(np.flatnonzero(t == step)).to(x.device)
        own = streams.rows(rows.to(streams.clients.device))
        noise[rows] = own.normal(f"optimizer {part.name}noise", noise.shape[1], step=int(step), dtype=x.dtype).to(
            x.device
        )
    return noise
