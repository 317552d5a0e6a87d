"""What `fedsim list TABLE ENTRY` says of every entry, and the files that `fedsim init` writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedsim import runs
from fedsim.compose import TABLES, compose
from fedsim.compose.keys import NEEDED, PLACES, keys_of, keys_of_entry, paragraph, yaml_of
from fedsim.compose.root import read_file
from fedsim.compose.sections import Local, Runtime
from fedsim.compose.starter import starter
from fedsim.overrides import apply_overrides
from tests.fedsim.console import fedsim


def test_keys_of_a_section_are_its_fields_with_type_default_and_meaning() -> None:
    keys = {key.name: key for key in keys_of(Local)}
    assert list(keys) == ["epochs", "steps", "batch_size", "shuffle", "optimizer"]
    assert keys["batch_size"].type == "a whole number or one of full" and keys["batch_size"].default_text == "20"
    assert keys["batch_size"].meaning == 'samples of a step, or "full" for all of a client\'s data.'
    assert keys["optimizer"].type == "an entry of optimizers"
    assert keys["optimizer"].default_text == "{name: sgd, lr: 0.05}"
    assert all(key.meaning for key in keys_of(Runtime))


def test_keys_of_a_strategy_are_its_own_first_then_what_it_shares_and_not_what_it_refuses() -> None:
    fedfix = [key.name for key in keys_of_entry("strategies", "fedfix")]
    assert fedfix[0] == "interval" and {"server_lr", "weights", "importance"} < set(fedfix)
    assert not {"local", "layout", "cohort_size"} & set(fedfix)
    (interval,) = (key for key in keys_of_entry("strategies", "fedfix") if key.name == "interval")
    assert (interval.default, interval.default_text) == (
        NEEDED,
        "needed",
    ) and interval.meaning == "seconds of a window."


def test_keys_of_an_optimizer_hold_what_its_name_stands_for() -> None:
    adamw = {key.name: key.default_text for key in keys_of_entry("optimizers", "adamw")}
    assert adamw["beta1"] == "0.9" and adamw["decay"] == "decoupled" and adamw["schedule"] == "null"
    assert "arXiv:1711.05101" in paragraph("optimizers", "adamw")


def test_a_meaning_that_many_share_is_inherited_and_one_of_its_own_goes_first() -> None:
    adam, lion, rmsprop = (
        {key.name: key.meaning for key in keys_of_entry("optimizers", name)} for name in ("adam", "lion", "rmsprop")
    )
    assert adam["beta1"] == "share of m, the running mean of gradients, that a step keeps."
    assert adam["eps"] == rmsprop["eps"] and lion["beta1"] != adam["beta1"] and lion["lr"] == adam["lr"]


def test_a_class_of_torch_is_shown_with_its_own_keys() -> None:
    found = fedsim("list", "optimizers", "torch.optim:SGD")
    assert found.code == 0 and "local.optimizer: {name: torch.optim:SGD}" in found.out
    keys = [key.name for key in keys_of_entry("optimizers", "torch.optim:SGD")]
    assert keys[:2] == ["lr", "momentum"] and not {"params", "clip"} & set(keys)


@pytest.mark.parametrize("table", TABLES)
def test_every_entry_of_every_table_can_be_shown(table: str) -> None:
    for name in TABLES[table]:
        keys = keys_of_entry(table, name)
        assert paragraph(table, name) and all(key.type and key.default_text for key in keys)
        assert not (silent := [key.name for key in keys if not key.meaning]), f"no meaning: {name}.{silent}"
        assert not keys or table in PLACES


def test_a_strategy_is_shown_with_its_place_in_a_file_and_every_key() -> None:
    found = fedsim("list", "strategies", "fedfix")
    assert found.code == 0 and "strategy: {name: fedfix, interval: ...}" in found.out
    for key in keys_of_entry("strategies", "fedfix"):
        assert re.search(rf"^{key.name} ", found.out, re.MULTILINE)
    assert "interval" in found.out and "seconds of a window." in found.out
    assert max(map(len, found.out.splitlines())) <= 120


def test_values_are_written_as_yaml_reads_them() -> None:
    for value in (None, True, 1e-8, "full", "two words", "1e-3", "null", [1, 2], {"a": {"b": [None, "x"]}}, {}):
        assert apply_overrides(f"v: {yaml_of(value)}", {}, "x") == {"v": value}


@pytest.mark.parametrize("strategy", TABLES["strategies"])
def test_a_first_file_of_every_strategy_is_accepted_and_its_remarks_are_the_defaults(strategy: str) -> None:
    text = starter(strategy, "digits")
    as_written, all_keys = text, re.sub(r"^( *)# (\w+: )", r"\1\2", text, flags=re.MULTILINE)
    assert all_keys.count("\n") == text.count("\n") and all_keys != text
    found = [read_file(apply_overrides(t, {}, "x"))[1] for t in (as_written, all_keys)]
    assert found[0]["strategy"].keys() == found[1]["strategy"].keys()
    assert (
        found[0]["local" if "local" in found[0] else "clients"]
        == found[1]["local" if "local" in found[1] else "clients"]
    )
    compose(apply_overrides(text, {}, "x"), "x").close()


def test_init_writes_a_file_that_runs(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    found = fedsim("init", "--strategy", "fedfix", "--dataset", "blobs", "-o", file)
    assert found.code == 0 and str(file) in found.out
    assert "# seconds of a window." in file.read_text() and "# num_examples: 2000" in file.read_text()
    assert len(runs.run(file, rounds=2)) == 2


@pytest.mark.parametrize("dataset", ["digits", "diabetes", "blobs", "marks", "synthetic", "shakespeare"])
def test_a_first_file_of_every_data_set_that_needs_no_download_is_accepted(dataset: str) -> None:
    composition = compose(apply_overrides(starter("fedavg", dataset), {}, "x"), "x")
    composition.close()
    assert composition.resolved["task"]["dataset"]["name"] == dataset and composition.samples.data.num_clients > 1


def test_a_first_file_takes_what_suits_the_data() -> None:
    speakers = apply_overrides(starter("fedavg", "shakespeare"), {}, "x")
    assert speakers["partition"] == "natural" and "clients" not in speakers and speakers["task"]["model"] == "char_lstm"
    assert apply_overrides(starter("fedavg", "npz"), {}, "x")["task"]["dataset"] == {"name": "npz", "path": "my-data"}
