"""What a step needs, gathered before it runs: coefficients on the host in float64, states, inputs.

When all clients agree on counter and hyper-parameters, a coefficient is a Python number; else it is computed per
client, cast once and moved to the device in one transfer as [k, 1].

Letters: k clients that step, P coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.groups import ParamGroup, Recipe, Values
from fedsim.optim.rule import Named, Rule, per_client
from fedsim.optim.state import OptState
from fedsim.optim.step import Block
from fedsim.streams import Streams


def assemble(
    recipe: Recipe,
    x: Tensor,
    state: OptState,
    *,
    lr_scale: float | Tensor,
    aux: Mapping[str, Tensor],
    streams: Streams | None,
) -> tuple[Block, dict[str, Any]]:
    """States, inputs and coefficients of the next step of x's k clients, and the host numbers after it."""
    k = x.shape[0]
    t = _agreed(state.t, k) + 1
    scale = lr_scale if isinstance(lr_scale, float | int) else lr_scale.double().cpu().numpy()[:k]
    block = Block(_shared(recipe, x, state, t, aux), [], [])
    after: dict[str, Any] = {}
    for group in recipe.groups:
        rule, base = rule_of(group, k), group.base
        lr = per_client("lr", base.lr, k) * scale
        host = Named({n: _agreed(state.host[group.name + n], k) for n in rule.host})
        coefs = {**rule.coefficients(t, lr, host), "lr": lr}
        if group.decays:  # what multiplies x: lambda, lambda times the learning rate, or times the schedule alone
            rate = per_client("weight_decay", base.weight_decay, k)
            alone = base.decay in ("l2", "in_update")
            coefs["decay_rate"] = rate if alone else rate * (scale if base.decay == "independent" else lr)
        after |= {group.name + n: getattr(host, n) for n in rule.host}
        block.coefs.append(_on_device(coefs, x))
        states: Values = {**own_states(group, state, x), "columns": group.own_columns(x)}
        if rule.inputs:
            states |= _inputs(group, x, np.broadcast_to(t, k), aux, streams)
        block.states.append(states)
    return block, after


def rule_of(group: ParamGroup, k: int) -> Rule:
    """The group's rule with the hyper-parameters of a stack's first k clients."""
    return group.rule.of_clients(k) if group.per_client else group.rule


def own_states(group: ParamGroup, state: OptState, x: Tensor) -> dict[str, Tensor]:
    """A group's states under their own names, the first k rows.

    Raises:
        ValueError: a buffer that is not what `Optimizer.init` makes: compiled steps trust its length.
    """
    found, k, clients = {}, x.shape[0], state.num_clients
    for s, width in zip(group.states, group.widths, strict=True):
        name = group.name + s.name
        buffer = state.buffers.get(name)
        if buffer is None or buffer.shape != (clients, width) or (s.dtype is None and buffer.dtype is not x.dtype):
            got = "nothing" if buffer is None else f"{list(buffer.shape)} of {buffer.dtype}"
            raise ValueError(
                f"the optimizer's state {name!r} should be [{clients}, {width}] of {s.dtype or x.dtype}, got {got}: "
                "it is damaged, or of another optimizer or model"
            )
        found[s.name] = buffer if k == clients else buffer[:k]
    return found


def named_states(group: ParamGroup, state: OptState, x: Tensor) -> Named:
    """The rule's own states of x's k clients."""
    s = Named(own_states(group, state, x))
    if group.storage is not None:
        group.storage.decode_(s, x)
    return s


def _agreed(values: Tensor, k: int) -> Any:
    """The number that the first k entries share, or those entries."""
    numbers = (values if k == values.shape[0] else values[:k]).tolist()
    return numbers[0] if numbers.count(numbers[0]) == k else np.array(numbers)


def _on_device(coefs: Mapping[str, Any], x: Tensor) -> Values:
    """Numbers stay numbers, arrays [k] become tensors [k, 1] in one transfer."""
    arrays = {n: v for n, v in coefs.items() if isinstance(v, np.ndarray)}
    if not arrays:
        return dict(coefs)
    table = torch.from_numpy(np.stack([v.astype(np.float64) for v in arrays.values()]))
    return {**coefs, **dict(zip(arrays, table.to(x.dtype).to(x.device).unsqueeze(2).unbind(0), strict=True))}


def _shared(recipe: Recipe, x: Tensor, state: OptState, t: Any, aux: Mapping[str, Tensor]) -> Values:
    """The weight average, where there is one."""
    if aux:
        known = {recipe.settings.gradient_need}.union(*(group.rule.inputs for group in recipe.groups)) - {"grad"}
        for name in aux:
            if name not in known:
                taken = ", ".join(sorted(known)) or "none"
                raise ValueError(f"aux {name!r} is no input of this optimizer, which takes {taken}")
    average, k = recipe.settings.average, len(x)
    if average is None:
        return {}
    values: dict[str, Any] = {"average_rate": 1 / t}
    if average.name == "ema":
        values["average_rate"] = 1 - per_client("average.decay", average.decay, k)
        if np.any(t == 1):
            values["average_first"] = np.where(t == 1, 1.0, 0.0) if np.ndim(t) else 1.0
    return _on_device(values, x) | {"average": state.buffers["average"][:k]}


def _inputs(group: ParamGroup, x: Tensor, t: np.ndarray, aux: Mapping[str, Tensor], streams: Streams | None) -> Values:
    """The extra tensors a rule declared; None for one that was not supplied this time."""
    for name in sorted(group.rule.wanted(t) & set(group.rule.inputs)):
        if name not in aux:
            raise ValueError(f"{group.label} needs aux[{name!r}] at this step; ask Optimizer.wanted before each")
    inputs: Values = {}
    for name in group.rule.active_inputs(t):
        value = aux.get(name)
        if name == "noise":
            inputs[name] = _noise(group, x, t, streams)
            continue
        picks = value is not None and group.columns is not None and value.shape[-1] == x.shape[1]
        inputs[name] = value[..., group.own_columns(x)] if picks and value is not None else value
    return inputs


def _noise(group: ParamGroup, x: Tensor, t: np.ndarray, streams: Streams | None) -> Tensor:
    """[k, p] standard normal, keyed by client, job and the client's own step."""
    if streams is None:
        raise ValueError(f"{group.label} draws noise: pass streams=... to step_")
    return by_step(streams, t, x[:, : sum(group.segments.sizes)], f"{group.name}noise")


def by_step(
    streams: Streams, t: np.ndarray, like: Tensor, name: str, draw: Callable[..., Tensor] = Streams.normal
) -> Tensor:
    """Keyed numbers [k, p] for clients whose step numbers t [k] differ: one draw per different number.

    Args:
        streams: of the k clients.
        t: part of the key.
        like: [k, p] on the device and in the type that is wanted.
        name: the rest of the key.
        draw: a method of `Streams`.
    """
    steps = np.unique(t)
    if len(steps) == 1:
        return draw(streams, f"optimizer {name}", like.shape[1], step=int(steps[0]), dtype=like.dtype).to(like.device)
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    for step in steps:
        rows = torch.from_numpy(np.flatnonzero(t == step))
        own = streams.rows(rows.to(streams.clients.device))
        drawn = draw(own, f"optimizer {name}", like.shape[1], step=int(step), dtype=like.dtype)
        out[rows.to(like.device)] = drawn.to(like.device)
    return out
