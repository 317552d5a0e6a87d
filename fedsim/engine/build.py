"""The table of engines."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedsim.engine.compiled import CompiledEngine
from fedsim.engine.loop import LoopEngine
from fedsim.engine.losses import LOSSES, Loss
from fedsim.engine.precision import check_precision
from fedsim.engine.protocol import Engine
from fedsim.engine.stacked import StackedEngine
from fedsim.params import Layout

ENGINES = {
    "loop": "plain autograd, one client after another: any module",
    "stacked": "one batched forward and backward pass for all clients of a stack, plain SGD fused into it",
    "compiled": "torch.compile of the vmapped gradient: for long runs of few shapes",
}


def build_engine(
    name: str,
    module: nn.Module,
    layout: Layout,
    loss: Loss | str = "cross_entropy",
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    native: bool = False,
) -> Engine:
    """An engine by name, for a module on a device.

    Args:
        name: one of `ENGINES`.
        module: any `nn.Module` of inputs [B, ...]; it is copied, and its own parameters are not used.
        layout: `Layout.of_module(module)`.
        loss: a name of `LOSSES`, or a function (logits, targets) -> [B].
        device: where stacks will lie.
        precision: fp32, tf32 or bf16 products; storage is float32.
        native: in the stacked engine on a CPU, a classifier's last layer and loss are compiled C++.

    Raises:
        ValueError: for an unknown name, or a layer whose noise cannot be keyed.
    """
    check_precision(precision)
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a function, got {loss!r}")
        loss = LOSSES[loss]
    module = copy.deepcopy(module).to(device)
    if name == "loop":
        return LoopEngine(module, layout, loss, precision)
    if name == "stacked":
        return StackedEngine(module, layout, loss, precision, native)
    if name == "compiled":
        return CompiledEngine(module, layout, loss, precision)
    raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
