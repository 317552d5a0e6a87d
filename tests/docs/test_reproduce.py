"""The harness of reproductions: one grid for every method, and verdicts that follow from the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reproduce import momentum
from benchmarks.reproduce.__main__ import TABLE
from benchmarks.reproduce.claims import verdict
from fedsim.history import History

ROOT = Path(__file__).parents[2]


def test_every_page_belongs_to_a_name() -> None:
    assert {page.stem for page in (ROOT / "docs" / "reproductions").glob("*.md")} <= set(TABLE)


@pytest.mark.parametrize("problem", momentum.PROBLEMS, ids=str)
def test_every_method_is_tried_with_the_same_rates_and_seeds(problem: momentum.Problem) -> None:
    sweep = problem.sweep(Path("runs"), quick=False)
    methods = sweep.space.methods()
    assert [m.name for m in methods] == list(momentum.NAMES) and len(sweep.seeds) == 3
    for method in methods:
        assert [s.values["local.optimizer.lr"] for s in method.grid()] == list(momentum.RATES)
        assert ("strategy.beta" in method.entries) == method.name.endswith(("_m", "_m_vr"))


def run(accuracies: list[float], loss: float) -> History:
    return History([{"round": i, "test_accuracy": a, "train_loss": loss} for i, a in enumerate(accuracies, 1)])


def test_a_verdict_follows_the_seeds() -> None:
    # FedAvg-M is ahead, the more under strong skew; SCAFFOLD-M is behind and jumps; the first VR form has less loss
    def found(gain: float) -> dict[str, list[History]]:
        runs = {name: [run([0.5] * 8, 1.0) for _ in range(3)] for name in momentum.NAMES}
        runs["fedavg_m"] = [run([0.5 + gain] * 8, 1.0) for _ in range(3)]
        runs["scaffold_m"] = [run([0.3, 0.4] * 4, 1.0) for _ in range(3)]
        runs["fedavg_m_vr"] = [run([0.5] * 8, 0.5 + 0.01 * k) for k in range(3)]
        return runs

    everything = {problem: found(0.1 if problem.alpha == 0.1 else 0.05) for problem in momentum.PROBLEMS}
    verdicts = [verdict(claim.gains(everything)) for claim in momentum.CLAIMS]
    assert verdicts == ["appears", "appears", "reversed", "reversed", "reversed", "appears", "not told apart"]
