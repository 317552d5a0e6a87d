"""The table of engines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedsim.config import imported
from fedsim.engine.compiled import CompiledEngine
from fedsim.engine.graphs import GraphedEngine
from fedsim.engine.loop import LoopEngine
from fedsim.engine.losses import LOSSES, Loss
from fedsim.engine.precision import check_precision
from fedsim.engine.protocol import Engine
from fedsim.engine.stacked import StackedEngine
from fedsim.params import Layout, on_device

ENGINES: dict[str, Callable[..., Engine]] = {"loop": LoopEngine, "stacked": StackedEngine, "compiled": CompiledEngine}


def build_engine(
    name: str,
    module: nn.Module,
    layout: Layout,
    loss: Loss | str = "cross_entropy",
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    native: bool = False,
    graphs: bool = False,
) -> Engine:
    """An engine by name, for a module on a device.

    Args:
        name: one of `ENGINES`, or the import path of the user's own, called as those are.
        module: any `nn.Module` of inputs [B, ...]; copies of it run with other tensors in place of its parameters.
        layout: `Layout.of_module(module)`.
        loss: a name of `LOSSES`, or a function (logits, targets) -> [B].
        device: where stacks will lie.
        precision: fp32, tf32 or bf16 products; storage is float32.
        native: in the stacked engine on a CPU, a classifier's last layer and loss are compiled C++.
        graphs: steps are captured as CUDA graphs and replayed (`GraphedEngine`).

    Raises:
        ValueError: for an unknown name, C++ in another engine than stacked, or a layer whose noise cannot be keyed.
    """
    check_precision(precision)
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a function, got {loss!r}")
        loss = LOSSES[loss]
    if name not in ENGINES and ":" not in name:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, or pkg.module:name, got {name!r}")
    make = ENGINES[name] if name in ENGINES else imported(name, "runtime.engine")
    options = {"native": True} if native else {}
    engine = make(on_device(module, device), layout, loss, precision, **options)
    return GraphedEngine(engine, layout) if graphs else engine
