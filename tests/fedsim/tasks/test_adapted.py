"""What of a model trains is said by names; what is frozen never travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fedsim
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.params import Layout, frozen_tensors
from fedsim.sim.packing import pack
from fedsim.tasks.adapted import Lora, LoraLinear, adapted, check_frozen
from fedsim.tasks.models import MODELS, init_parameters
from tests.build import rows_of

CONFIG: dict[str, Any] = {
    "rounds": 2,
    "partition": {"name": "iid"},
    "clients": {"count": 6},
    "strategy": {"name": "fedavg", "cohort_size": 4},
    "local": {"steps": 2, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 0.01}},
    "evaluate": {"every": 2},
}
LORA = {"targets": ["1"], "rank": 3}


def config(**task: Any) -> dict[str, Any]:
    return CONFIG | {"task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp"}} | task}


def mlp() -> nn.Module:
    return MODELS["mlp"]((1, 8, 8), 10)


def test_an_adapted_layer_gives_at_first_what_it_gave_and_keeps_its_names() -> None:
    plain, _ = init_parameters(mlp, seed=0)
    module, _ = init_parameters(lambda: adapted(mlp(), (), Lora(targets=("1", "3"), rank=4)), seed=0)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(module(x), plain(x))
    assert all(torch.equal(module.state_dict()[k], v) for k, v in plain.state_dict().items())
    added = {k: tuple(v.shape) for k, v in module.state_dict().items() if k not in plain.state_dict()}
    assert added == {"1.lora_a": (4, 64), "1.lora_b": (200, 4), "3.lora_a": (4, 200), "3.lora_b": (10, 4)}
    again, other = (init_parameters(lambda: adapted(mlp(), (), Lora(targets=("1",))), seed=seed)[1] for seed in (0, 1))
    assert torch.equal(again, init_parameters(lambda: adapted(mlp(), (), Lora(targets=("1",))), seed=0)[1])
    assert not torch.equal(again, other)
    with torch.no_grad():
        module[1].lora_b.normal_()
        merged = module[1].weight + 16 / 4 * module[1].lora_b @ module[1].lora_a
        flat = x.flatten(1)
        assert torch.allclose(module[1](flat), flat @ merged.T + module[1].bias, atol=1e-5)


def test_names_say_what_trains() -> None:
    module = adapted(mlp(), ["3.*"], Lora(targets=("1",)))
    assert Layout.of_module(module).names == ("1.lora_a", "1.lora_b", "3.weight", "3.bias")
    assert set(frozen_tensors(module)) == {"1.weight", "1.bias"}
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert Layout.of_module(adapted(tied, ["1.weight"], None)).names == ("0.weight",)


class Shared(nn.Module):
    """A layer, or a block that holds it, under two names."""

    def __init__(self, block: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4)) if block else nn.Linear(4, 4)
        self.second, self.third = self.first, nn.Linear(4, 4)
        self.third.weight = self.first[0].weight if block else self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_a_layer_in_two_places_has_no_adapter_but_a_shared_block_and_a_shared_weight_have() -> None:
    for targets in (("first",), ("second",), ("*",)):
        with pytest.raises(ValueError, match="first and second of the model are one layer, and an adapter stands in"):
            adapted(Shared(block=False), (), Lora(targets=targets))
    assert Layout.of_module(adapted(Shared(block=False), (), Lora(targets=("third",)))).size == 2 * 8 * 4
    module = adapted(Shared(block=True), (), Lora(targets=("*",)))
    assert module.first[0] is module.second[0]  # type: ignore[index]
    assert module.third.weight is module.first[0].weight  # type: ignore[index, union-attr]
    names = [f"{layer}.lora_{side}" for layer in ("first.0", "third") for side in "ab"]
    assert list(Layout.of_module(module).names) == names


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ({"train": ["head.*"]}, r"task: 'head\.\*' of \['head\.\*'\] matches no parameter of the model; its param"),
        ({"lora": {"targets": ["*.query"]}}, r"matches no linear layer of the model; its linear layers are 1, 3"),
        ({"lora": {"targets": ["1"], "rank": 0}}, "lora needs rank >= 1"),
        ({"lora": {"targets": []}}, "lora.targets must name linear layers"),
        ({"model": {"name": f"{__name__}:still"}}, "task: every parameter of the model is frozen; name"),
        ({"model": {"name": f"{__name__}:drifting"}, "train": ["2.*"]}, "task.model: its buffer 0.seen changes in"),
        (
            {"model": {"name": f"{__name__}:bypassed"}, "lora": {"targets": ["*.linear1"]}},
            "in evaluation its layer encoder.linear1 is not called",
        ),
        (
            {"model": {"name": f"{__name__}:bypassed"}, "lora": {"targets": ["*.linear1"]}, "train": ["*"]},
            "in evaluation its layer encoder.linear1 is not called",
        ),
        (
            {"model": {"name": f"{__name__}:halved"}, "train": ["2.*"]},
            r"task.model: what trains is float32, and beside its frozen part \(bfloat16\) .*; load or make",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_the_first_round(task: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        compose(config(**task), "x.yaml")


def still(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return mlp().requires_grad_(False)


class Counting(nn.Module):
    """A frozen layer that counts its samples."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + len(x)
        return x * self.weight


class Halved(nn.Flatten):
    """In half precision from here on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


def halved(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(Halved(), nn.Linear(64, 8), nn.Linear(8, 10)).bfloat16()


def drifting(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(Counting(), nn.Flatten(), nn.Linear(64, 10))


class Rows(nn.Module):
    """An image's rows as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x[:, 0]).mean(1))


def bypassed(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Rows()


def test_bits_are_those_of_what_trains_and_the_plan_says_so() -> None:
    composition = compose(config(lora=LORA, train=["3.*"]), "x.yaml")
    try:
        plan, layout = composition.plan, composition.experiment.task.layout
    finally:
        composition.close()
    trained = 3 * 64 + 200 * 3 + 200 * 10 + 10
    assert layout.size == trained and plan["model"] == f"{trained:,} parameters"
    assert plan["frozen"].startswith("13,000 parameters (0.0 MiB), one copy a worker")
    assert plan["bits per round"].startswith(f"{32 * trained * 4 / 1e6:,.2f} Mbit")
    rows = rows_of(config(lora=LORA, train=["3.*"]))
    assert rows[-1]["bits_up"] == rows[-1]["bits_down"] == 2 * 4 * 32 * trained
    assert "frozen" not in compose(config(), "x.yaml").plan


def test_a_worker_gets_frozen_weights_once() -> None:
    composition = compose(config(model={"name": "mlp", "hidden": [2000]}, lora=LORA), "x.yaml")
    composition.close()
    _, buffers = pack(composition.experiment.task)
    assert [b.nbytes for b in buffers].count(4 * 64 * 2000) == 1


def test_a_run_gives_the_same_bits_with_any_workers_and_engines_agree() -> None:
    first = rows_of(config(lora=LORA))
    two = rows_of(config(lora=LORA) | {"runtime": {"workers": 2, "stack": 2}})
    assert two == rows_of(config(lora=LORA) | {"runtime": {"workers": 1, "stack": 2}})
    loop = rows_of(config(lora=LORA) | {"runtime": {"engine": "loop"}})
    for rows in (two, loop):
        assert rows[-1]["test_loss"] == pytest.approx(first[-1]["test_loss"], abs=1e-5)


def test_a_run_writes_the_whole_state_dict_and_checkpoints_what_trains(tmp_path: Path) -> None:
    file = config(lora=LORA) | {"checkpoint": {"every": 1}}
    history = fedsim.run(file, out=tmp_path / "run")
    saved = load_file(tmp_path / "run" / "model.safetensors")
    module, _ = init_parameters(lambda: adapted(mlp(), (), Lora(targets=("1",), rank=3)), seed=0)
    assert saved.keys() == module.state_dict().keys()
    assert torch.equal(saved["3.weight"], module.state_dict()["3.weight"])
    assert not torch.equal(saved["1.lora_b"], module.state_dict()["1.lora_b"])
    module.load_state_dict(saved)
    written = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert 0 < written < 4 * 13_000
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == len(history.rows) == 2


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    file = config(lora=LORA) | {"checkpoint": {"every": 1}}
    whole = rows_of(file)
    rows_of(file | {"rounds": 1}, tmp_path)
    assert rows_of(file, tmp_path, resume=True)[-1] == whole[-1]


def test_a_tied_weight_is_saved_under_both_names() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    layout = Layout.of_module(module)
    saved = layout.state_dict(torch.arange(24.0), module)
    assert torch.equal(saved["0.weight"], saved["1.weight"])
    assert saved["0.weight"].data_ptr() != saved["1.weight"].data_ptr()
    module.load_state_dict(saved)


def test_checking_leaves_the_module_alone() -> None:
    module = adapted(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)), (), Lora(targets=("2",)))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    random = torch.get_rng_state()
    check_frozen(module, lambda m: m(torch.randn(2, 64, generator=torch.Generator().manual_seed(0))))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert module.training and isinstance(module[2], LoraLinear) and "forward" not in vars(module[2])
    assert torch.equal(random, torch.get_rng_state())


def test_the_trained_model_of_a_folder_has_its_adapters(tmp_path: Path) -> None:
    history = fedsim.run(config(lora=LORA, train=["3.bias"]), out=tmp_path / "run")
    here, there = history.model.state_dict(), fedsim.History.load(tmp_path / "run").model.state_dict()
    assert "1.lora_b" in there and there["1.lora_b"].any()
    assert here.keys() == there.keys() and all(torch.equal(value, there[name]) for name, value in here.items())
