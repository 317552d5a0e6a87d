"""What a GPU would be asked to do in a round, counted on the pretend device of the tests.

    python -m benchmarks.launches

A launch costs a GPU's host some 5 microseconds, whatever it computes, and a wait costs it all that is still enqueued.
So a stack pays when launches do not grow with its clients, and graphs where a step is many launches. Figures are of one
steady round: what two rounds take less what one does. Of these, those of a local step are what a further step adds.
Counted are operations as torch dispatches them, each at least one kernel; a replay of a graph is one.
"""

from __future__ import annotations

from typing import Any

from fedsim.compose import compose
from fedsim.loop import Run
from tests.device import pretend_gpu

MLP = {"name": "mlp", "hidden": [200]}
SGD, ADAMW = {"name": "sgd", "lr": 0.05}, {"name": "adamw", "lr": 0.001}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | str, dict[str, Any]]] = {
    "FedAvg, MLP in factors": ({"name": "fedavg"}, MLP, SGD),
    "FedAvg, CNN": ({"name": "fedavg"}, "cnn", SGD),
    "FedAvg, ResNet": ({"name": "fedavg"}, "resnet", SGD),
    "AdamW, MLP": ({"name": "fedavg"}, MLP, ADAMW),
    "AdamW, CNN": ({"name": "fedavg"}, "cnn", ADAMW),
    "SCAFFOLD-M, CNN": ({"name": "scaffold_m"}, "cnn", SGD),
    "Krum, MLP": ({"name": "fedavg", "aggregator": {"name": "krum", "f": 2}}, MLP, SGD),
    "FedBuff, MLP": ({"name": "fedbuff", "buffer_size": 4}, MLP, SGD),
}
COHORTS = (8, 64)


def counted(case: str, clients: int, steps: int, rounds: int, graphs: bool) -> tuple[int, int, int, int]:
    """(launches, waits, bytes to the device, bytes from it) of so many rounds with all clients."""
    strategy, model, optimizer = CASES[case]
    data = {"name": "blobs", "num_examples": 100 * clients, "shape": [1, 28, 28], "num_test": 0}
    config = {
        "rounds": rounds,
        "task": {"name": "classification", "dataset": data, "model": model},
        "clients": {"count": clients},
        "strategy": strategy,
        "local": {"steps": steps, "batch_size": 20, "optimizer": optimizer},
        "evaluate": {"every": 1000, "per_client": False},
        "runtime": {"device": "cuda", "workers": 1, "graphs": graphs},
    }
    with pretend_gpu() as counts:
        composition = compose(config, case)
        before = counts.launches, counts.waits, counts.bytes_up, counts.bytes_down
        list(Run(composition.experiment).rounds())
        composition.close()
        after = counts.launches, counts.waits, counts.bytes_up, counts.bytes_down
    launches, waits, up, down = (b - a for a, b in zip(before, after, strict=True))
    return launches, waits, up, down


def steady(case: str, clients: int, steps: int, graphs: bool) -> list[int]:
    """What the second round adds to the first."""
    one, two = (counted(case, clients, steps, rounds, graphs) for rounds in (1, 2))
    return [b - a for a, b in zip(one, two, strict=True)]


def main() -> None:
    print("| a round of | clients | launches | of them a local step | in graphs | a step | waits | bytes up | down |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        for clients in COHORTS:
            launches, waits, up, down = steady(case, clients, 3, False)
            replayed, waits_too, *_ = steady(case, clients, 3, True)
            assert waits == waits_too
            step, step_too = (steady(case, clients, 4, g)[0] - n for g, n in ((False, launches), (True, replayed)))
            print(
                f"| {case} | {clients} | {launches} | {step} | {replayed} | {step_too} | {waits} | {up:,} | {down:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
