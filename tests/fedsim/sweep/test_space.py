"""What a sweep goes through, from the words of the command line."""

from __future__ import annotations

import pytest

from fedsim.config import ConfigError
from fedsim.sweep.space import Choice, Range, Setting, Space, parse_space


def space(*texts: str, per: str | None = None) -> Space:
    return parse_space(texts, per, "x.yaml")


def test_values_are_those_of_fedsim_run_and_commas_inside_brackets_are_theirs() -> None:
    found = space("rounds=3", "task.model.hidden=[10],[20,30]", "a=1e-3,x", "b=[1,2]", "c='u,v',w").common
    assert found["rounds"] == 3 and found["b"] == [1, 2]
    assert found["task.model.hidden"] == Choice(([10], [20, 30]))
    assert found["a"] == Choice((0.001, "x")) and found["c"] == Choice(("u,v", "w"))
    entries = space("partition={name: iid},{name: dirichlet, alpha: 0.1}").common["partition"]
    assert entries == Choice(({"name": "iid"}, {"name": "dirichlet", "alpha": 0.1}))


def test_a_grid_is_the_product_of_its_lists_with_the_last_fastest() -> None:
    (method,) = space("rounds=3", "a.lr=0.1,0.2", "task.model.hidden=[10],[20,30]").methods()
    settings = method.grid()
    assert [s.name for s in settings] == ["lr=0.1,hidden=10", "lr=0.1,hidden=20-30", "lr=0.2,hidden=10"] + [
        "lr=0.2,hidden=20-30"
    ]
    assert settings[1].overrides == {"rounds": 3, "a.lr": 0.1, "task.model.hidden": [20, 30]}
    assert settings[1].values == {"a.lr": 0.1, "task.model.hidden": [20, 30]}


def test_folders_are_named_by_what_tells_them_apart() -> None:
    assert Setting("", {"local.optimizer.lr": 0.1, "strategy.optimizer.lr": 1}, {}).name == (
        "local.optimizer.lr=0.1,strategy.optimizer.lr=1"
    )
    assert Setting("", {"data.root": "/a/b"}, {}).name == "root=a-b"
    long = [Setting("", {f"key{i}": i for i in range(40)} | {"last": last}, {}).name for last in (1, 2)]
    assert all(len(name) < 200 for name in long) and long[0] != long[1]


def test_a_minus_sign_tells_values_apart() -> None:
    (method,) = space("a=-1,1", "b=[-1,2],[1,2]").methods()
    assert [s.name for s in method.grid()] == ["a=-1,b=-1-2", "a=-1,b=1-2", "a=1,b=-1-2", "a=1,b=1-2"]


def test_a_method_has_its_own_axes_before_the_common_ones() -> None:
    found = space(
        "strategy.name=fedavg,fedavg_m,scaffold_m",
        "local.optimizer.lr=0.1,0.2",
        "fedavg_m,scaffold_m:strategy.beta=0.1,0.3",
        "scaffold_m:local.optimizer.lr=0.5",
        per="strategy.name",
    )
    plain, momentum, both = found.methods()
    assert [m.name for m in found.methods()] == ["fedavg", "fedavg_m", "scaffold_m"]
    assert [s.values for s in plain.grid()] == [
        {"strategy.name": "fedavg", "local.optimizer.lr": lr} for lr in (0.1, 0.2)
    ]
    assert len(momentum.grid()) == 4 and momentum.grid()[1].overrides == {
        "strategy.name": "fedavg_m",
        "local.optimizer.lr": 0.1,
        "strategy.beta": 0.3,
    }
    assert [s.overrides["local.optimizer.lr"] for s in both.grid()] == [0.5, 0.5]


def test_the_name_of_a_method_is_applied_before_its_fields() -> None:
    (one, _) = space("strategy.cohort_size=5", "strategy={name: fedavg},{name: scaffold}", per="strategy").methods()
    assert list(one.grid()[0].overrides) == ["strategy", "strategy.cohort_size"]


@pytest.mark.parametrize(
    ("kind", "low", "high", "shares", "values"),
    [
        ("uniform", 0.0, 2.0, (0.0, 0.25), (0.0, 0.5)),
        ("log", 1e-4, 1.0, (0.0, 0.25, 0.5), (1e-4, 1e-3, 1e-2)),
        ("int", 1, 3, (0.0, 0.34, 0.999), (1, 2, 3)),
    ],
)
def test_a_range_is_even_in_its_own_measure(kind, low, high, shares, values) -> None:
    found = [Range(kind, low, high).at(share) for share in shares]
    assert found == pytest.approx(values) and all(isinstance(v, int) == (kind == "int") for v in found)


def test_a_drawn_number_is_the_one_that_its_folders_name_says() -> None:
    value = Range("log", 1e-3, 1).at(0.4)
    assert float(str(value)) == value and len(f"{value:g}".replace("0.", "")) <= 6


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=1,"], "a=1,: has an empty value"),
        (["a="], "a=: has an empty value"),
        (["a=1,2,1"], "two values are the same"),
        (["a=log(1,0.1)"], "is empty; the lower end comes first"),
        (["a=log(0,1)"], "no logarithm"),
        (["a=int(1,2.5)"], "whole numbers"),
        (["a=normal(0,1)"], r"no such range; write log\(1e-3,1\)"),
        (["a=log(x,1)"], "could not convert"),
        (["a=log(1,2),3"], "a range stands alone"),
        (["a"], "override 'a' has no key and '='"),
        (["seed=0,1"], "seed: give seeds as --seeds 0,1,2"),
        (["seed=[0,1]"], "seed: give seeds as --seeds 0,1,2"),
        (["fedavg:a=1,2"], "fedavg: names a method; say by --per"),
    ],
)
def test_what_makes_no_sense_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(*texts)


def test_methods_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="--per strategy.name: is no list of values"):
        space("a=1,2", per="strategy.name")
    with pytest.raises(ConfigError, match="fedavgm: is no value of strategy.name; did you mean 'fedavg_m'"):
        space("strategy.name=fedavg,fedavg_m", "fedavgm:a=1,2", per="strategy.name")
    for own, message in {
        "fedavg:seed=1,2": "fedavg:seed: give seeds as --seeds",
        "fedavg:strategy.name=scaffold": "fedavg:strategy.name: is what --per tells methods apart by",
    }.items():
        with pytest.raises(ConfigError, match=message):
            space("strategy.name=fedavg,fedavg_m", own, per="strategy.name")
    with pytest.raises(ConfigError, match=r"a=log\(1,2\) is a range; add --search"):
        space("a=log(1,2)").methods()[0].grid()
