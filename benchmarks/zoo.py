"""Every kind of model with `engine: auto` beside the loop engine and a plain PyTorch loop, in one process.

    python -m benchmarks.zoo [--models mlp ...] [--seconds 8] [--widths 1 4]

One core takes local steps of plain SGD for as many clients as `auto` puts into a stack (with --widths, stacks of those
widths are measured as well). The ways take turns; a figure is milliseconds of the core for one client's step, the
median of all turns, and the ratios divide `auto` by the two others, turn by turn: above 1, `auto` loses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.engine import Batch, build_engine, choose_engine
from fedsim.engine.choose import graphed
from fedsim.pages import keep_freed_memory
from fedsim.params import Layout
from fedsim.tasks.models import MODELS, TransformerBlock, init_parameters

IMAGES, TOKENS = (1, 28, 28), (80,)
CLASSES = {IMAGES: 10, TOKENS: 80}
STEPS, LR = 3, 0.05


class ViT(nn.Module):
    """Images cut into patches by one convolution, then transformer blocks and the mean over the patches."""

    def __init__(self, width: int, *, patch: int = 7, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, 0.0) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(x).mean(1))


class Attentive(nn.Module):
    """Tokens and their positions through torch's own attention, and a logit for each position and token."""

    def __init__(self, width: int, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(80, width), nn.Embedding(80, width)
        self.body, self.head = body, nn.Linear(width, 80)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.body(x))


class SelfAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention of a sequence to itself, as most people call it: it averages its weights as well."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + super().forward(x, x, x)[0]


class GRU(nn.Module):
    """Characters [B, T] -> logits [B, T, V]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(80, 8), nn.Linear(width, 80)
        self.gru = nn.GRU(8, width, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(x))[0])


def _encoder(width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return Attentive(width, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def _attention(width: int) -> nn.Module:
    return Attentive(width, SelfAttention(width, 4, batch_first=True))


@dataclass(frozen=True)
class Case:
    """A model on samples of some shape, and its batch size."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 20


def _zoo(name: str, shape: tuple[int, ...], batch: int = 20, **options: Any) -> Case:
    return Case(partial(MODELS[name], shape, CLASSES[shape], **options), shape, batch)


CASES = {
    "mlp 200": _zoo("mlp", IMAGES),
    "mlp 128": _zoo("mlp", IMAGES, hidden=[128]),
    "cnn": _zoo("cnn", IMAGES),
    "resnet 16": _zoo("resnet", IMAGES),
    "resnet 64": _zoo("resnet", IMAGES, 5, width=64),
    "char_lstm 256": _zoo("char_lstm", TOKENS, 10),
    "char_lstm 128": _zoo("char_lstm", TOKENS, 10, hidden=128),
    "transformer 64": _zoo("transformer", TOKENS, 10),
    "transformer 128": _zoo("transformer", TOKENS, 10, width=128),
    "vit 64": Case(partial(ViT, 64), IMAGES),
    "vit 128": Case(partial(ViT, 128), IMAGES),
    "nn encoder 64": Case(partial(_encoder, 64), TOKENS, 10),
    "nn encoder 128": Case(partial(_encoder, 128), TOKENS, 10),
    "nn attention 64": Case(partial(_attention, 64), TOKENS, 10),
    "gru 128": Case(partial(GRU, 128), TOKENS, 10),
}


class Ways:
    """The ways to compute `STEPS` steps of some clients of a case."""

    def __init__(self, case: Case, device: torch.device | str = "cpu", rows: int = 16) -> None:
        self.case, self.device = case, torch.device(device)
        self.module, self.x0 = init_parameters(case.make, seed=0)
        self.layout = Layout.of_module(self.module)
        generator = torch.Generator().manual_seed(0)
        size, classes = (rows, case.batch), CLASSES.get(case.shape, 10)
        tokens = case.shape == TOKENS
        targets = torch.randint(classes, (*size, *(case.shape if tokens else ())), generator=generator)
        inputs = targets if tokens else torch.randn(*size, *case.shape, generator=generator)
        self.x0, self.inputs, self.targets = (t.to(self.device) for t in (self.x0, inputs, targets))

    def plan(self, engine: str = "auto", stack: int | str = "auto") -> Any:
        return choose_engine(
            self.module,
            self.layout,
            device=self.device,
            batch_size=self.case.batch,
            steps=100,
            num_clients=1000,
            engine=engine,
            stack=stack,
            sample=self.inputs[0, 0],
        )

    def engine(self, plan: Any, graphs: bool | str = "auto") -> Callable[[], int]:
        """A call that steps the clients of one stack and says how many steps it took."""
        options = {"native": plan.native, "graphs": graphed(plan.engine, self.device, graphs)}
        engine = build_engine(plan.engine, self.module, self.layout, device=self.device, **options)
        x, out = torch.empty(2, plan.width, self.layout.size, device=self.device)
        batch = Batch(self.inputs[: plan.width], self.targets[: plan.width])

        def call() -> int:
            session = engine.session(x.copy_(self.x0))
            for _ in range(STEPS):
                if session.sgd_step_(batch, LR) is None:
                    gradient, _ = session.gradient(batch, out)
                    x.sub_(gradient, alpha=LR)
            return STEPS * plan.width

        return call

    def plain(self) -> Callable[[], int]:
        """The same for one client as one writes it in plain PyTorch."""
        module = self.case.make().to(self.device)
        start = {k: v.clone() for k, v in self.module.state_dict().items()}
        inputs, targets = self.inputs[0], self.targets[0]

        def call() -> int:
            module.load_state_dict(start)
            optimizer = torch.optim.SGD(module.parameters(), lr=LR)
            for _ in range(STEPS):
                optimizer.zero_grad()
                F.cross_entropy(module(inputs).flatten(0, -2), targets.flatten()).backward()
                optimizer.step()
            return STEPS

        return call


def measure(ways: dict[str, Callable[[], int]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a client's step in each of the turns that fit into so many seconds, seven at least."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    started, turns = time.perf_counter(), 0
    while turns < 7 or time.perf_counter() - started < seconds:
        for name, call in ways.items():
            began = time.thread_time()
            steps = call()
            found[name].append((time.thread_time() - began) / steps * 1e3)
        turns += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seconds", type=float, default=8.0, help="for each model")
    parser.add_argument("--widths", nargs="+", type=int, default=[], help="of stacks to measure beside auto's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    for name in args.models:
        here = Ways(CASES[name])
        plan = here.plan()
        ways = {"auto": here.engine(plan), "loop": here.engine(here.plan("loop")), "plain": here.plain()}
        ways |= {f"stacked {w}": here.engine(here.plan("stacked", w)) for w in args.widths}
        turns = measure(ways, args.seconds)
        ms = {way: median(found) for way, found in turns.items()}
        ratios = "  ".join(
            f"auto/{way} {median(a / b for a, b in zip(turns['auto'], turns[way], strict=True)):.2f}"
            for way in ("loop", "plain")
        )
        others = "  ".join(f"{way} {ms[way]:.2f}" for way in ways if way != "auto")
        print(f"{name:16} {ratios}   auto ({plan.engine} {plan.width}) {ms['auto']:.2f} ms  {others}", flush=True)


if __name__ == "__main__":
    main()
