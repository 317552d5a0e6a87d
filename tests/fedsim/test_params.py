"""Layouts: views share memory, buffers come last, and a module survives the round trip."""

from __future__ import annotations

import torch
from torch import nn

from fedsim.engine.noise import keyed_copy
from fedsim.params import Layout, on_device, program_of
from fedsim.tasks.adapted import Lora, adapted


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.body.bias.requires_grad_(False)


def test_views_share_memory_with_the_flat_stack() -> None:
    layout = Layout.of({"w": (2, 3), "b": (2,), "s": ()})
    flat = torch.zeros(4, layout.size)
    views = layout.views(flat)
    views["w"][1, 0, 2] = 5.0
    views["s"][3] = 7.0
    assert flat[1, 2] == 5.0 and flat[3, 8] == 7.0
    assert torch.equal(layout.flatten(views), flat)


def test_trainable_entries_come_before_buffers_and_frozen_parameters_are_none() -> None:
    layout = Layout.of_module(Net())
    n = len(layout.names) - layout.num_buffers
    assert layout.names[:n] == ("embed.weight", "norm.weight", "norm.bias", "body.weight", "head.weight", "head.bias")
    assert layout.names[n:] == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert layout.num_trainable == 20 + 4 + 4 + 12 + 6 + 2
    assert layout.trainable.size == layout.num_trainable


def test_roles_tell_embeddings_and_the_head_from_hidden_matrices() -> None:
    layout = Layout.of_module(Net())
    assert dict(zip(layout.names, layout.roles, strict=True)) | {} == {
        "embed.weight": "embed",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "body.weight": "matrix",
        "head.weight": "head",
        "head.bias": "vector",
        "norm.running_mean": "vector",
        "norm.running_var": "vector",
        "norm.num_batches_tracked": "vector",
    }


def test_a_frozen_head_makes_no_other_matrix_the_head() -> None:
    net = Net()
    net.head.requires_grad_(False)
    layout = Layout.of_module(net)
    assert "head" not in layout.roles and layout.last_layer == ()
    lora = Layout.of_module(adapted(Net(), (), Lora(targets=("body",))))
    assert lora.names == ("body.lora_a", "body.lora_b") and lora.last_layer == () and set(lora.roles) == {"matrix"}
    adapters = Layout.of_module(adapted(Net(), (), Lora(targets=("body", "head"))))
    assert adapters.last_layer == ("head.lora_a", "head.lora_b")


def test_a_state_dict_loads_back_into_the_module() -> None:
    net = Net()
    layout = Layout.of_module(net)
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    flat = layout.flatten({k: v.detach() for k, v in tensors.items()})
    other = Net()
    with torch.no_grad():
        other.body.bias.copy_(net.body.bias)  # frozen: whoever builds the module has it
    loaded = Net()
    loaded.load_state_dict(layout.state_dict(flat, other))
    other = loaded
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
        assert other.state_dict()[name].dtype == value.dtype


def test_a_program_shares_parameters_and_nothing_else() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for copy in (program_of(module), on_device(module, "cpu"), keyed_copy(module)):
        assert all(a is b for a, b in zip(copy.parameters(), module.parameters(), strict=True))
        assert all(a is not b for a, b in zip(copy.modules(), module.modules(), strict=True))
        copy.eval()
        copy[1].running_mean.fill_(5.0)
    assert module.training and module[1].running_mean.tolist() == [0.0, 0.0]
    there = on_device(module, "meta")
    assert all(p.device.type == "meta" for p in there.parameters())
    assert all(p.device.type == "cpu" for p in module.parameters())
