"""Models of transformers, whole and with adapters, beside those of peft; skipped where these are not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.engine import Batch, build_engine
from fedsim.engine.losses import cross_entropy
from fedsim.engine.stacked import StackedEngine
from fedsim.params import Layout
from fedsim.tasks.adapted import Lora, adapted
from fedsim.tasks.huggingface import Logits, pretrained
from fedsim.tasks.models import init_parameters
from tests.fedsim.engine.zoo import streams

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
BERT: dict[str, Any] = {"model_type": "bert", **SIZES}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30, "pad_token_id": 0}
LORA = Lora(targets=("*.query", "*.value"), rank=2, alpha=4.0)


def made(lora: Lora | None = None) -> tuple[nn.Module, Layout, Tensor]:
    train = ["model.classifier.*"] if lora else []
    module, x0 = init_parameters(lambda: adapted(pretrained((6,), 3, config=BERT), train, lora), seed=0)
    return module, Layout.of_module(module), x0


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (3, 2, 6), generator=generator)
    ids[1, 1, 4:] = 0  # padding
    return Batch(ids, torch.randint(3, (3, 2), generator=generator), None, streams(3))


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_engines_agree_with_dropout_and_padding(lora: Lora | None) -> None:
    module, layout, x0 = made(lora)
    assert layout.num_buffers == 0
    x = x0.repeat(3, 1) + 0.05 * torch.randn(3, len(x0), generator=torch.Generator().manual_seed(1))
    engine = StackedEngine(module, layout, cross_entropy)
    g, loss = engine.session(x).gradient(batch())
    expected, expected_loss = build_engine("loop", module, layout).session(x).gradient(batch())
    assert engine.path == ("vmap" if lora else "tape"), engine.reason
    assert (g - expected).abs().max() < 1e-5 and (loss - expected_loss).abs().max() < 1e-5


def test_padding_does_not_matter() -> None:
    module = made()[0].eval()
    ids = batch().inputs[1]
    assert torch.allclose(module(ids)[1], module(ids[1:, :4])[0], atol=1e-5)
    assert isinstance(module, Logits) and module.pad == 0


def test_models_that_look_back_only_keep_their_own_mask() -> None:
    module = pretrained((6,), 30, config=GPT2, head="AutoModelForCausalLM").eval()
    assert isinstance(module, Logits) and module.pad is None
    ids = batch().inputs[1]
    assert torch.allclose(module(ids)[1, :4], module(ids[1:, :4])[0], atol=1e-5)


def test_adapters_equal_pefts() -> None:
    peft = pytest.importorskip("peft")
    module, layout, x0 = made(LORA)
    x = x0.repeat(3, 1) + 0.05 * torch.randn(3, len(x0), generator=torch.Generator().manual_seed(1))
    b = batch()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    g, loss = build_engine("stacked", module, layout).session(x).gradient(b)
    base = init_parameters(lambda: pretrained((6,), 3, config=BERT), seed=0)[0]
    settings = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.0
    )
    other = Logits(peft.get_peft_model(base.model, settings).eval(), 0)
    for row, inputs, targets, own, found in zip(x, b.inputs, b.targets, g, loss, strict=True):
        theirs = {_peft_name(k): v for k, v in layout.views(row).items()}
        assert theirs.keys() == {k for k, p in other.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for k, v in theirs.items():
                other.get_parameter(k).copy_(v)
        expected = nn.functional.cross_entropy(other(inputs), targets)
        grads = torch.autograd.grad(expected, [other.get_parameter(k) for k in theirs])
        assert abs(found - expected) < 1e-6
        assert (own - torch.cat([p.flatten() for p in grads])).abs().max() < 1e-6


@pytest.mark.parametrize("config", [BERT, GPT2], ids=["bert", "gpt2"])
def test_a_mask_of_the_data_is_the_one_that_transformers_takes_and_clients_stay_one_program(
    config: dict[str, Any],
) -> None:
    shapes = {"input_ids": (6,), "attention_mask": (6,)}
    module = pretrained(
        shapes, 30, config=config, head="AutoModelForMaskedLM" if config is BERT else "AutoModelForCausalLM"
    )
    mask = torch.tensor([[[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]]).expand(3, 2, 6)
    inputs = {"input_ids": batch().inputs, "attention_mask": mask}
    ours, plain = (
        module.eval()(**{k: v[0] for k, v in inputs.items()}),
        module.model(**{k: v[0] for k, v in inputs.items()}),
    )
    assert torch.allclose(ours[mask[0] == 1], plain.logits[mask[0] == 1], atol=1e-5)
    layout = Layout.of_module(module)
    engine = StackedEngine(module, layout, cross_entropy)
    x = init_parameters(lambda: module, seed=0)[1].repeat(3, 1)
    engine.session(x).gradient(Batch(inputs, batch().inputs, None, streams(3)))
    assert engine.path == "vmap"


def _peft_name(name: str) -> str:
    """Where peft keeps what is `name` in ours."""
    name = name.replace("model.", "model.base_model.model.", 1)
    name = name.replace("lora_a", "lora_A.default.weight").replace("lora_b", "lora_B.default.weight")
    return name.replace("classifier.", "classifier.modules_to_save.default.")


def test_a_model_made_by_peft_travels_as_its_adapters() -> None:
    peft = pytest.importorskip("peft")
    base = pretrained((6,), 3, config=BERT)
    assert isinstance(base, Logits)
    base.model = peft.get_peft_model(base.model, peft.LoraConfig(r=2, target_modules=["query"]))
    layout = Layout.of_module(base)
    assert layout.size == 2 * 2 * 2 * 16 and layout.num_buffers == 0
    x = init_parameters(lambda: base, seed=0)[1].repeat(3, 1)
    engine = StackedEngine(base, layout, cross_entropy)
    g, _ = engine.session(x).gradient(batch())
    assert engine.path == "vmap" and g.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give either path, a folder or a model of the hub, or config"),
        ({"config": BERT, "head": "AutoModelForBirds"}, "head must be one of transformers' AutoModelFor"),
    ],
)
def test_mistakes_are_answered(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pretrained((6,), 3, **options)


def test_weights_saved_in_half_precision_are_read_as_what_trains(tmp_path: Path) -> None:
    pretrained((6,), 3, config=BERT).model.bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in pretrained((6,), 3, path=str(tmp_path)).parameters()} == {torch.float32}
