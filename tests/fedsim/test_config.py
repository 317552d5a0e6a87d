"""The experiment file: what is read, what is refused, and what the resolved file records."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from fedsim import runs
from fedsim.config import Call, ConfigError, FromTable, at, decode, decode_entry, did_you_mean, naming, place
from fedsim.overrides import apply_overrides, parse_overrides, read_file, shipped


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 3

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")


@dataclass(frozen=True, kw_only=True)
class Section:
    needed: int
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    maybe: int | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def circle(radius: float, colour: str = "red") -> tuple[str, float, str]:
    """A round thing."""
    return ("circle", radius, colour)


def square(*, side: int) -> tuple[str, int]:
    """A thing with corners."""
    return ("square", side)


SHAPES: dict[str, Callable[..., Any]] = {"circle": circle, "square": square}


KINDS = {"shape": lambda value, key, kinds: decode_entry(SHAPES, value, key, kinds)}


def shape(value: Any) -> Call:
    return decode_entry(SHAPES, value, "s")


# Sections and values ----------------------------------------------------------------------------------------------


def test_a_section_fills_its_target_and_records_every_default() -> None:
    call = decode(Section, {"needed": 4, "rate": 1, "inner": {"depth": 7}}, "part")
    assert call() == Section(needed=4, rate=1.0, inner=Inner(depth=7))
    assert call.resolved == {
        "needed": 4,
        "rate": 1,
        "kind": "a",
        "sizes": [1, 2],
        "maybe": None,
        "flag": False,
        "inner": {"depth": 7},
    }


def test_the_resolved_section_reads_back_to_the_same() -> None:
    first = decode(Section, {"needed": 4}, "part")
    second = decode(Section, first.resolved, "part")
    assert second() == first() and second.resolved == first.resolved


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"^part.needed: missing; part needs it and it has no default"),
        ({"needed": 1, "rait": 1}, r"part.rait: unknown key; did you mean 'rate'\?"),
        ({"needed": 1, "zzz": 1}, r"part.zzz: unknown key; known: needed, rate, kind, sizes, maybe, flag, inner"),
        ({"needed": "1"}, r"part.needed: expected a whole number, got '1'"),
        ({"needed": True}, r"part.needed: expected a whole number, got true"),
        ({"needed": 1.0}, r"part.needed: expected a whole number, got 1.0"),
        ({"needed": None}, r"part.needed: expected a whole number, got null"),
        (
            {"needed": 2**63},
            r"part.needed: 9223372036854775808 needs more than the 64 bits that a whole number may have",
        ),
        ({"needed": 1, "sizes": [1, -(2**64)]}, r"part.sizes: -18446744073709551616 needs more than the 64 bits"),
        ({"needed": 1, "rate": "fast"}, r"part.rate: expected a number, got 'fast'"),
        ({"needed": 1, "kind": "c"}, r"part.kind: expected one of a, b, got 'c'"),
        ({"needed": 1, "sizes": 3}, r"part.sizes: expected a list of whole numbers, got 3"),
        ({"needed": 1, "sizes": [1, "x"]}, r"part.sizes: expected a list of whole numbers"),
        ({"needed": 1, "maybe": "x"}, r"part.maybe: expected a whole number or null, got 'x'"),
        ({"needed": 1, "flag": "maybe"}, r"part.flag: expected true or false, got 'maybe'"),
        ({"needed": 1, "inner": {"deep": 1}}, r"part.inner.deep: unknown key; did you mean 'depth'\?"),
        ({"needed": 1, "inner": {"depth": 0}}, r"part.inner: depth must be at least 1, got 0 \(test_config.py, line"),
        ({"needed": 1, "inner": 3}, r"part.inner: expected a section of key: value lines \(depth\), got 3"),
        ([1], r"part: expected a section of key: value lines \(needed, .*\), got \[1\]"),
    ],
)
def test_what_does_not_fit_is_named_by_file_key_and_value(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Section, section, "part")()


def test_an_empty_section_is_all_defaults() -> None:
    assert decode(Inner, None, "part")() == decode(Inner, {}, "part")() == Inner()
    assert decode(Section, {"needed": 1, "inner": None}, "part")() == Section(needed=1)


def test_a_key_that_another_section_sets_is_refused_where_it_is_not_its_place() -> None:
    with pytest.raises(ConfigError, match="part.needed: is not set here but by its own section"):
        decode(Section, {"needed": 1}, "part", later=["needed"])
    assert decode(Section, {}, "part", later=["needed"])(needed=3).needed == 3


@dataclass(frozen=True, kw_only=True)
class Whole:
    seed: int = 0
    part: Section


def test_a_file_is_a_section_of_sections() -> None:
    call = decode(Whole, {"part": {"needed": 2}}, "")
    assert call() == Whole(part=Section(needed=2)) and call.resolved["part"]["needed"] == 2
    with pytest.raises(ConfigError, match="^part.needed: missing; part needs it"):
        decode(Whole, {}, "")
    with pytest.raises(ConfigError, match=r"^seeds: unknown section; did you mean 'seed'\?"):
        decode(Whole, {"seeds": 4}, "")


# Tables -----------------------------------------------------------------------------------------------------------


def test_an_entry_is_a_name_or_a_name_with_fields() -> None:
    with pytest.raises(ConfigError, match="^s.radius: missing"):
        shape("circle")
    assert shape({"name": "square", "side": 2})() == ("square", 2)
    assert shape({"name": "square", "side": 2}).resolved == {"name": "square", "side": 2}
    assert shape({"name": "circle", "radius": 2, "colour": "blue"})() == ("circle", 2.0, "blue")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("circel", r"s.name: unknown name 'circel'; did you mean 'circle'\?"),
        ("my.shapes.Round", r"s.name: unknown name 'my.shapes.Round'; an import path is written 'my.shapes:Round'"),
        ("circle.", r"s.name: unknown name 'circle.'; did you mean 'circle'\?"),
        ({"name": "zzz"}, r"s.name: unknown name 'zzz'; known: circle, square"),
        ({"side": 2}, r"s: expected a name or \{name: ..., ...\}, got .*; known: circle, square"),
        (["circle"], r"s: expected a name or"),
    ],
)
def test_an_entry_that_is_none_is_refused_with_the_table(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape(value)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Annotated[Any, FromTable("shape", "circle")] = None
    other: Annotated[Any, FromTable("shape")] = None


def test_nested_entries_are_built_too_and_an_optional_one_may_be_null() -> None:
    call = decode(Drawing, {"shape": {"name": "square", "side": 3}}, "d", KINDS)
    assert call() == Drawing(shape=("square", 3), other=None)
    assert call.resolved == {"shape": {"name": "square", "side": 3}, "other": None}
    assert decode(Drawing, call.resolved, "d", KINDS)() == call()


def test_a_nested_entry_has_the_tables_default() -> None:
    with pytest.raises(ConfigError, match="d.shape.radius: missing"):
        decode(Drawing, {}, "d", KINDS)


def test_a_nested_entry_is_made_when_what_it_needs_is_given_and_handed_on_until_then() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Drawing:
        shape: Annotated[Any, FromTable("shape")]

    kinds = {"shape": lambda value, key, kinds: decode_entry(SHAPES, value, key, kinds, needs=["side"])}
    call = decode(Drawing, {"shape": "square"}, "d", kinds)
    assert call(side=4) == Drawing(shape=("square", 4))
    assert call().shape(side=5) == ("square", 5)
    with pytest.raises(ConfigError, match="^d.shape.side: is not set here"):
        decode(Drawing, {"shape": {"name": "square", "side": 1}}, "d", kinds)


def test_what_fills_a_parameter_gives_way_to_the_file() -> None:
    for value, expected in (
        ("circle", ("circle", 2, "red")),
        ({"name": "circle", "radius": 3}, ("circle", 3.0, "red")),
    ):
        call = decode_entry(SHAPES, value, "s", fills=["radius"])
        assert call(radius=2) == expected
    assert decode_entry(SHAPES, "circle", "s", fills=["radius"]).resolved == {"name": "circle", "colour": "red"}


def test_what_was_made_is_checked_under_its_key() -> None:
    def check(made: Any, name: str) -> Any:
        if made[1] > 2:
            raise ValueError(f"{name} is too wide")
        return made[1]

    assert decode_entry(SHAPES, {"name": "square", "side": 2}, "a.b", check=check)() == 2
    with pytest.raises(ConfigError, match="^a.b: square is too wide$"):
        decode_entry(SHAPES, {"name": "square", "side": 3}, "a.b", check=check)()


def test_an_error_has_its_key_and_then_its_file() -> None:
    with pytest.raises(ConfigError, match="^x.yaml: a.b: too low$"), naming("x.yaml"), at("a.b"):
        raise ValueError("too low")
    with pytest.raises(ConfigError, match="^a.b: too low$"), at("a"), at("a.b"):
        raise ValueError("too low")


# The user's own code ----------------------------------------------------------------------------------------------

CODE = """\
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from nowhere import Nothing

class Own:
    '''A plain class.'''
    def __init__(self, size: int, *, colour: str = "red") -> None:
        if size > 5:
            raise ValueError("size is too large")
        self.size, self.colour = size, colour

def untyped(size, colour="red"):
    return size, colour

def greedy(**everything):
    return everything

def unreadable(x: Nothing) -> None: ...

def fails() -> None:
    {}["gone"]

def takes_object(x: Own | None = None) -> object:
    return x

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_code_for_config.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "own_code_for_config"
    sys.modules.pop("own_code_for_config", None)


def test_own_code_comes_by_import_path_from_the_working_folder(module: str) -> None:
    call = shape({"name": f"{module}:Own", "size": 2})
    made = call()
    assert (made.size, made.colour) == (2, "red")
    assert call.resolved == {"name": f"{module}:Own", "size": 2, "colour": "red"}


def test_own_code_without_type_hints_takes_what_it_is_given(module: str) -> None:
    assert shape({"name": f"{module}:untyped", "size": [1]})() == ([1], "red")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "M:Own", "size": "big"}, r"s.size: expected a whole number, got 'big'"),
        ({"name": "M:Own", "size": 9}, r"s: size is too large \(M.py, line 10\)"),
        ({"name": "M:Own", "siez": 2}, r"s.siez: unknown key; did you mean 'size'\?"),
        ({"name": "M:untyped"}, r"s.size: missing"),
        ({"name": "M:greedy", "size": 1}, r"s.size: unknown key$"),
        ({"name": "M:unreadable"}, r"s: the type hints of .* can't be read: name 'Nothing' is not defined"),
        ({"name": "M:fails"}, r"s: KeyError: 'gone' \(M.py, line 22\)"),
        ({"name": "M:takes_object", "x": 1}, r"s.x: a file can't hold a Own or null; give it a default and leave it"),
        ({"name": "M:nothing"}, r"s.name: module 'M' has no 'nothing'"),
        ({"name": "M:number"}, r"s.name: 'M:number' is a int, not a class or function"),
        ({"name": "M.sub:x"}, r"s.name: can't import 'M.sub:x'"),
    ],
)
def test_own_code_that_does_not_fit_is_named(module: str, entry: dict[str, Any], message: str) -> None:
    entry = {k: v.replace("M", module) if isinstance(v, str) else v for k, v in entry.items()}
    with pytest.raises(ConfigError, match=message.replace("M", module)):
        shape(entry)()


def test_a_mistake_in_code_of_ours_is_not_hidden() -> None:
    def broken() -> None:
        raise KeyError("a bug")

    broken.__module__ = "fedsim.somewhere"
    with pytest.raises(KeyError, match="a bug"):
        decode(broken, {}, "key")()
    assert place(KeyError(), broken) is None


# Files and overrides ----------------------------------------------------------------------------------------------


def test_numbers_are_numbers_whatever_their_form(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: 1e-3\nb: 1_000\nc: 1E5\nd: .5\ne: '1e-3'\nf: on\ng: null\nh: ~\n")
    assert read_file(file) == {"a": 1e-3, "b": 1000, "c": 1e5, "d": 0.5, "e": "1e-3", "f": True, "g": None, "h": None}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=3", {"a": {"b": 3, "c": 2}, "s": "fedavg"}),
        ("a.b=1e-3", {"a": {"b": 1e-3, "c": 2}, "s": "fedavg"}),
        ("a.new.deep=[1, 2]", {"a": {"b": 1, "c": 2, "new": {"deep": [1, 2]}}, "s": "fedavg"}),
        ("a={b: 5}", {"a": {"b": 5, "c": 2}, "s": "fedavg"}),
        ("a={name: z}", {"a": {"name": "z"}, "s": "fedavg"}),
        ("a=z", {"a": "z", "s": "fedavg"}),
        ("a=null", {"a": None, "s": "fedavg"}),
        ("s.size=5", {"a": {"b": 1, "c": 2}, "s": {"name": "fedavg", "size": 5}}),
        ("s={name: scaffold, size: 3}", {"a": {"b": 1, "c": 2}, "s": {"name": "scaffold", "size": 3}}),
        ("t=a=b", {"a": {"b": 1, "c": 2}, "s": "fedavg", "t": "a=b"}),
    ],
)
def test_overrides_set_merge_or_replace(override: str, expected: dict[str, Any]) -> None:
    raw = {"a": {"b": 1, "c": 2}, "s": "fedavg"}
    assert apply_overrides(raw, parse_overrides([override], "x"), "x") == expected
    assert raw == {"a": {"b": 1, "c": 2}, "s": "fedavg"}


def test_later_overrides_win_and_see_earlier_ones() -> None:
    texts = ["s={name: scaffold}", "s.size=5", "s.size=6"]
    assert apply_overrides({}, parse_overrides(texts, "x"), "x") == {"s": {"name": "scaffold", "size": 6}}


FEDFIX = {"name": "fedfix", "interval": 3, "server_lr": 0.5, "weights": "identical", "aggregator": {"name": "median"}}
FEDAVG = {"name": "fedavg", "cohort_size": 5, "server_lr": 0.5, "selection": {"name": "power_of_choice"}}


@pytest.mark.parametrize(
    ("file", "name", "kept", "dropped"),
    [
        (FEDAVG, "scaffold", {"cohort_size", "server_lr", "selection"}, ""),
        (FEDAVG, "fedavg", {"cohort_size", "server_lr", "selection"}, ""),
        (FEDAVG, "fedfix", {"server_lr"}, "cohort_size: 5, selection: {'name': 'power_of_choice'} of fedavg"),
        (FEDFIX, "fedavg", {"server_lr", "aggregator"}, "interval: 3, weights: identical of fedfix"),
        (FEDFIX, "async_fedavg", {"server_lr", "weights", "aggregator"}, "interval: 3 of fedfix"),
        ({"name": "fedavg_m", "beta": 0.3}, "scaffold_m", {"beta"}, ""),
        # the same letter, and another thing
        ({"name": "fedprox", "mu": 0.3}, "ditto", set(), "mu: 0.3 of fedprox"),
        (FEDAVG, "fedagv", set(), ""),  # unknown, as is said later
    ],
)
def test_naming_another_strategy_keeps_what_both_have_and_says_what_is_dropped(
    file: dict[str, Any], name: str, kept: set[str], dropped: str
) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = runs.load({"strategy": file}, {"strategy": name})[0]["strategy"]
    assert found == {"name": name} | {k: file[k] for k in kept}
    words = [f"strategy={name} drops {dropped}; write strategy={{name: {name}, ...}} to replace it whole"]
    assert [str(w.message) for w in said] == (words if dropped else [])


def test_an_entry_written_whole_replaces_without_a_word_and_so_does_the_name_of_another_section() -> None:
    whole = {"name": "scaffold", "server_lr": 2.0}
    assert runs.load({"strategy": FEDAVG}, {"strategy": whole})[0]["strategy"] == whole
    assert runs.load({"partition": {"name": "dirichlet", "alpha": 1}}, {"partition": "iid"})[0]["partition"] == {
        "name": "iid"
    }


def test_another_optimizer_keeps_no_rate_and_says_so_unless_it_is_given_one() -> None:
    file = {"local": {"steps": 2, "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9}}}
    with pytest.warns(UserWarning, match=r"local.optimizer=adam drops lr: 0.5, momentum: 0.9 of sgd"):
        assert runs.load(file, {"local.optimizer": "adam"})[0]["local"]["optimizer"] == {"name": "adam"}
    both = {"local.optimizer": "adam", "local.optimizer.lr": 0.1, "local.optimizer.momentum": 0.8}
    assert runs.load(file, both)[0]["local"] == {"steps": 2, "optimizer": {"name": "adam", "lr": 0.1, "momentum": 0.8}}


@pytest.mark.parametrize("entry", ["fedprox", {"name": "fedprox"}])
def test_a_field_is_set_whether_it_is_given_before_its_entry_or_after(entry: Any) -> None:
    both = {"strategy.mu": 0.5, "strategy": entry}
    for overrides in (both, dict(reversed(both.items()))):
        assert runs.load({"strategy": {"name": "fedavg"}}, overrides)[0]["strategy"] == {"name": "fedprox", "mu": 0.5}


@pytest.mark.parametrize("text", ["rounds", "=3", ""])
def test_an_override_needs_a_key_and_a_value(text: str) -> None:
    with pytest.raises(ConfigError, match=r"x: override '.*' has no key and '='; write key.sub=value"):
        parse_overrides([text], "x")


def test_values_may_refer_to_other_keys_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("n: 5\nclients: {count: '${n}'}\n")
    assert runs.load(tmp_path / "x.yaml", {"n": 7})[0] == {"n": 7, "clients": {"count": 7}}
    (tmp_path / "y.yaml").write_text("clients: {count: '${m}'}\n")
    with pytest.raises(ConfigError, match=r"y.yaml: not readable: .*'m' not found"):
        read_file(tmp_path / "y.yaml")


@pytest.mark.parametrize(
    ("known", "hint"),
    [(["fedavg", "scaffold"], "; did you mean 'fedavg'?"), (["abc"], "; known: abc"), ([], "")],
)
def test_the_nearest_name_is_offered_or_all(known: Sequence[str], hint: str) -> None:
    assert did_you_mean("fedagv", known) == hint


def test_a_bare_name_is_a_file_that_comes_with_fedsim_unless_one_of_that_name_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_file("quickstart", {"rounds": 3})["rounds"] == 3
    assert read_file("quickstart") == read_file(shipped()["quickstart"])
    with pytest.raises(ConfigError, match="quickstrat: no such file; did you mean 'quickstart'"):
        read_file("quickstrat")
    with pytest.raises(ConfigError, match="here/quickstart: no such file"):
        read_file("here/quickstart")
    (tmp_path / "quickstart").write_text("rounds: 7\n")
    assert read_file("quickstart") == {"rounds": 7}
