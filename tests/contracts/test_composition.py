"""Every pair of a strategy and an option that composes also runs, and docs/composition.md says which do."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import pytest

from fedsim.runs import run
from fedsim.strategies import STRATEGIES
from tests.composition import OPTIONS, page, pair, refusal

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore:.*the run went astray")  # as a mean does under the worst factor
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_allowed_pair_runs_a_few_rounds(strategy: str) -> None:
    # every option with every third strategy: for the suite's time
    for option in (None, *OPTIONS)[list(STRATEGIES).index(strategy) % 3 :: 3]:
        if refusal(strategy, option) is None:
            history = run(pair(strategy, option))
            assert len(history.rows) == 3, option
            assert all(isfinite(v) for k, v in history.rows[-1].items() if isinstance(v, float)), option


def test_the_page_says_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert Path("docs/composition.md").read_text(encoding="utf-8") == page()


def test_every_strategy_has_a_config() -> None:
    named = {p.stem for p in (ROOT / "configs").glob("*.yaml")}
    assert set(STRATEGIES) - {"fedavg"} <= named
