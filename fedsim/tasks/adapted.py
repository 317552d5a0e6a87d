"""What of a model trains: some of its parameters, by name, or low-rank adapters beside its linear layers.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. LoRA: Low-Rank Adaptation of Large Language Models. arXiv:2106.09685.

The rest is frozen. It is no part of a client's vector, so nobody sends, averages or steps it, and one copy of it serves
all clients of a worker: a stack takes the product with a frozen weight once, for the samples of all its clients.

Letters: B samples, I inputs and O outputs of a linear layer, R the rank of its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.config import first_line
from fedsim.engine.functional import still_norms, switch
from fedsim.params import frozen_tensors, matching, program_of


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of rank R beside linear layers, whose output becomes W a + (alpha / R) B A a.

    Args:
        targets: names of the layers, such as `*.query`.
        rank: R.
        alpha: of the adapters' weight.
        dropout: of the adapters' inputs.
    """

    targets: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            found = f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}"
            raise ValueError(f"lora needs rank >= 1, alpha > 0 and dropout in [0, 1), got {found}")
        if not self.targets:
            raise ValueError("lora.targets must name linear layers, such as ['*.query', '*.value'], got none")


class LoraLinear(nn.Linear):
    """A linear layer with an adapter, in the place and under the names of the layer it was made from.

    B is zero at first, so that the layer gives what it gave; A is drawn as torch draws a linear layer's weight.
    """

    def __init__(self, source: nn.Linear, settings: Lora) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(source.__dict__)
        self._parameters, self._modules = dict(source._parameters), dict(source._modules)
        self.scale = settings.alpha / settings.rank
        self.lora_a = nn.Parameter(source.weight.new_empty(settings.rank, source.in_features))
        self.lora_b = nn.Parameter(source.weight.new_zeros(source.out_features, settings.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=sqrt(5))
        self.drop = nn.Dropout(settings.dropout)

    def forward(self, input: Tensor) -> Tensor:
        low = nn.functional.linear(self.drop(input), self.lora_a) * self.scale
        # a copy [R, O]: on a CPU products in the backward pass are faster by half where no inner axis is as short as R
        return super().forward(input) + low @ self.lora_b.t().contiguous()


def adapted(module: nn.Module, train: Sequence[str], lora: Lora | None) -> nn.Module:
    """The module itself, in which only what was named trains; as it is where nothing was.

    Args:
        module: it is changed.
        train: patterns of names of parameters; a tied one has several.
        lora: adapters that train too.

    Raises:
        ValueError: for a pattern that matches nothing, an adapter beside a layer that stands in two places, or a module
            in which nothing trains.
    """
    if train or lora is not None:
        module = _changed(module, train, lora)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("every parameter of the model is frozen; name some in task.train, or set task.lora")
    return module


def _changed(module: nn.Module, train: Sequence[str], lora: Lora | None) -> nn.Module:
    named = dict(module.named_parameters(remove_duplicate=False))
    chosen = {id(named[name]) for name in matching(list(named), train, "parameter of the model; its parameters")}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    # of the very class: what derives from it may be read by its parent without being called, as in attention
    linears = [k for k, layer in module.named_modules(remove_duplicate=False) if type(layer) is nn.Linear]
    targets = () if lora is None else matching(linears, lora.targets, "linear layer of the model; its linear layers")
    for name in targets:
        assert lora is not None
        layer = module.get_submodule(name)
        if isinstance(layer, LoraLinear):  # made under another name of a module around it
            continue
        assert isinstance(layer, nn.Linear)
        _check_place(module, layer)
        if not name:
            return LoraLinear(layer, lora)
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, LoraLinear(layer, lora))
    return module


def _check_place(module: nn.Module, layer: nn.Linear) -> None:
    """Refuse a layer that its module holds twice: in one place it would have an adapter, in the other none."""
    held = [
        f"{path}.{own}".lstrip(".") for path, m in module.named_modules() for own, c in m._modules.items() if c is layer
    ]
    if len(held) > 1:
        raise ValueError(
            f"{' and '.join(held)} of the model are one layer, and an adapter stands in one place; leave it out of "
            "task.lora.targets, or make two layers that share their weight"
        )


def check_frozen(module: nn.Module, forward: Callable[[nn.Module], Any]) -> None:
    """Refuse a module whose frozen part would change in training, or that would leave adapters out in evaluation.

    Args:
        module: it stays as it is.
        forward: a pass of it on a few samples, with what trains in float32 as engines have it.

    Raises:
        ValueError: in these cases.
    """
    frozen, trial = frozen_tensors(module), program_of(module)
    adapters, called = {k: m for k, m in trial.named_modules() if isinstance(m, LoraLinear)}, set[str]()
    if not frozen and not adapters:
        return

    def note(name: str, layer: LoraLinear) -> Callable[[Tensor], Tensor]:
        def noted(input: Tensor) -> Tensor:
            called.add(name)
            return LoraLinear.forward(layer, input)

        return noted

    for name, layer in adapters.items():
        vars(layer)["forward"] = note(name, layer)  # a hook would change what is tried
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            forward(switch(trial, False, ()))
        except Exception as e:  # whatever the user's module holds
            kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in frozen.values()}))
            raise ValueError(
                f"what trains is float32, and beside its frozen part ({kinds}) that fails: {first_line(e)}; load or "
                "make the model in float32"
            ) from e
        if missing := sorted(adapters.keys() - called):
            raise ValueError(
                f"in evaluation its layer {missing[0]} is not called (nn.TransformerEncoderLayer reads its layers' "
                "weights itself), so an adapter there would be left out; take it out of task.lora.targets"
            )
        forward(switch(trial, True, still_norms(trial)))
    for name, now in trial.named_buffers():
        if name in frozen and not torch.equal(now, frozen[name]):
            raise ValueError(
                f"its buffer {name} changes in training, but nothing in its layer trains or it is no part of the "
                "state dict, so clients would share it; let something train there, or register it with persistent=True"
            )
