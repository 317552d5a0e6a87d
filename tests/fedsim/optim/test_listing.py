"""What `fedsim list optimizers` prints."""

from fedsim.optim.listing import listing
from fedsim.optim.table import RULES


def test_it_fits_in_100_columns() -> None:
    assert max(map(len, listing().splitlines())) <= 100


def test_a_rule_has_its_facts_beside_its_name_and_its_remark_below() -> None:
    lines = listing().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("mezo "))
    assert lines[at].split() == ["mezo", "E/X", "0", "loss_eval", "arXiv:2305.17333"]
    assert lines[at + 1] == "    " + RULES["mezo"].note


def test_nothing_of_the_table_is_lost_in_folding() -> None:
    text = listing()
    letters = "".join(text.split())
    for name, entry in RULES.items():
        assert f"\n{name} " in text
        assert "".join(entry.note.split()) in letters, name
        words = set(text.split())
        assert set(entry.paper.split()) | set(entry.memory.split()) | {entry.kind} <= words, name
