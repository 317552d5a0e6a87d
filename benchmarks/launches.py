"""What a GPU would be asked to do in a round, counted on the pretend device of the tests.

    python -m benchmarks.launches

A launch costs a GPU's host some 5 microseconds, whatever it computes, and a wait costs it all that is still enqueued.
So a stack pays when launches do not grow with its clients, and graphs where a step is many launches. Figures are of a
steady round: the fourth, or a mean of several where those of a strategy differ. Of these, those of a local step are
what a further step adds. Counted are operations as torch dispatches them, each at least one kernel; a replay of a
graph is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fedsim.compose import compose
from fedsim.data.dataset import Dataset
from fedsim.loop import Run
from tests.device import pretend_gpu

MLP = {"name": "mlp", "hidden": [200]}
SGD, ADAMW = {"name": "sgd", "lr": 0.05}, {"name": "adamw", "lr": 0.001}
# what is counted depends on no sizes but the layers' widths, so images and batches are as small as a CPU likes
WIDE, SMALL = ({"name": "blobs", "shape": [1, n, n], "num_test": 0} for n in (28, 8))
TEXT = {"name": "benchmarks.launches:text"}
POSITIONS = 10
FIRST = 3  # rounds, in which every kind of step is made often enough to be replayed from then on
BATCH, SAMPLES = 4, 16  # of a step and of a client


@dataclass(frozen=True)
class Case:
    """A round to count.

    Args:
        model, data: of the task.
        strategy: its section.
        optimizer: of local steps; None where the strategy takes a step of its own.
        cohorts: clients that take part or are in flight; a line each.
        rounds: that are counted, after the first ones.
    """

    model: dict[str, Any] | str
    data: dict[str, Any] = field(default_factory=lambda: SMALL)
    strategy: dict[str, Any] = field(default_factory=lambda: {"name": "fedavg"})
    optimizer: dict[str, Any] | None = field(default_factory=lambda: SGD)
    cohorts: tuple[int, ...] = (8, 64)
    rounds: int = 1


ALL = (8, 64, 512)
CASES = {
    "FedAvg, MLP in factors": Case(MLP, WIDE),
    "FedAvg, CNN": Case("cnn"),
    "FedAvg, ResNet": Case("resnet"),
    "FedAvg, LSTM, 10 positions": Case("char_lstm", TEXT),
    "FedAvg, transformer": Case("transformer", TEXT),
    "AdamW, MLP": Case(MLP, optimizer=ADAMW),
    "AdamW, CNN": Case("cnn", optimizer=ADAMW),
    "SCAFFOLD-M, CNN": Case("cnn", strategy={"name": "scaffold_m"}),
    "Krum, MLP": Case(MLP, strategy={"name": "fedavg", "aggregator": {"name": "krum", "f": 2}}, cohorts=ALL),
    "MoNNA, MLP": Case(MLP, strategy={"name": "monna", "f": 2}, cohorts=ALL),
    "MASHA1, MLP": Case(
        MLP,
        strategy={"name": "masha1", "lr": 0.05, "p": 1e-6, "compressor": {"name": "rand_k", "k": 100}},
        optimizer=None,
    ),
    "FedBuff, MLP in factors": Case(MLP, WIDE, {"name": "fedbuff", "buffer_size": 4}, cohorts=ALL, rounds=128),
}


def text(num_examples: int) -> Dataset:
    """Random tokens, and the next ones."""
    tokens = torch.randint(80, (num_examples, POSITIONS + 1), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    return Dataset(inputs=x, targets=y, test_inputs=x[:0], test_targets=y[:0], num_classes=80)


def counted(case: Case, clients: int, steps: int, graphs: bool) -> list[float]:
    """[launches, waits, bytes to the device, bytes from it] of a round."""
    data = {**case.data, "num_examples": SAMPLES * clients}
    config = {
        "rounds": FIRST + case.rounds,
        "task": {"name": "classification", "dataset": data, "model": case.model},
        "clients": {"count": clients},
        "strategy": case.strategy,
        "local": {"steps": steps, "batch_size": BATCH, "optimizer": case.optimizer} if case.optimizer else {},
        "evaluate": {"every": 1000, "per_client": False},
        "runtime": {"device": "cuda", "workers": 1, "graphs": graphs},
    }
    with pretend_gpu() as counts:
        composition = compose(config, "config")
        run = Run(composition.experiment)
        for _ in range(FIRST):
            run.step()
        before = counts.launches, counts.waits, counts.bytes_up, counts.bytes_down
        for _ in range(case.rounds):
            run.step()
        composition.close()
        after = counts.launches, counts.waits, counts.bytes_up, counts.bytes_down
    return [(b - a) / case.rounds for a, b in zip(before, after, strict=True)]


def figures(case: Case, clients: int, graphs: bool) -> list[str]:
    """Cells of a line: launches, those of a local step, waits, bytes up and down."""
    launches, *others = counted(case, clients, 3, graphs)
    step = counted(case, clients, 4, graphs)[0] - launches if case.optimizer and case.rounds == 1 else 0
    return [f"{launches:,.0f}", f"{step:.0f}" if step else "", *(f"{n:,.0f}" for n in others)]


def main() -> None:
    print("| a round of | clients | launches | of them a local step | in graphs | a step | waits | bytes up | down |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        for clients in case.cohorts:
            launches, step, *others = figures(case, clients, graphs=False)
            replayed, step_too, *others_too = figures(case, clients, graphs=True)
            assert others == others_too
            print(
                f"| {name} | {clients} | {launches} | {step} | {replayed} | {step_too} | {' | '.join(others)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
