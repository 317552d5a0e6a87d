"""The module of a run's folder, made again from its tensors and the resolved file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from fedsim.config import Call, decode, decode_entry
from fedsim.params import filled
from fedsim.tasks.adapted import Lora, adapted
from fedsim.tasks.adversarial import Perturbed
from fedsim.tasks.gan import players
from fedsim.tasks.models import MODELS, as_module

SIZES = ("input_shape", "num_classes")  # that a factory may ask for


def stored_model(path: Path, task: Mapping[str, Any]) -> nn.Module:
    """The trained module of a run's folder, in evaluation mode.

    Args:
        path: its tensors (safetensors), with the sizes it was made for in the head.
        task: that section of the run's resolved config.

    Raises:
        ValueError: if there is no such file, the task has no module, or its model is no longer what it was.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it is written when the run is complete")
    with safe_open(path, "pt") as file:
        found = json.loads((file.metadata() or {}).get("fedsim", "{}")).get("sizes")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if found is None or not {"model", "generator"} & set(task):
        raise ValueError(f"{path}: its task has no module; safetensors.torch.load_file reads the tensors")
    return filled(_module(task, {k: _shapes(v) for k, v in found.items()}), tensors)


def _module(task: Mapping[str, Any], sizes: Mapping[str, Any]) -> nn.Module:
    if "generator" in task:
        return players(_factory(task, "generator"), _factory(task, "discriminator"), **sizes)
    lora = None if task.get("lora") is None else decode(Lora, task["lora"], "task.lora")()
    made = adapted(_factory(task, "model")(**sizes), task.get("train") or (), lora)
    return Perturbed(made, **sizes) if task.get("name") == "adversarial" else made


def _factory(task: Mapping[str, Any], name: str) -> Call:
    return decode_entry(MODELS, task[name], f"task.{name}", needs=SIZES, check=as_module)


def _shapes(size: Any) -> Any:
    """A size as it was before it was written: JSON has no tuples, also in a dictionary of several inputs' shapes."""
    if isinstance(size, dict):
        return {name: _shapes(own) for name, own in size.items()}
    return tuple(size) if isinstance(size, list) else size
