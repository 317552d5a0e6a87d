"""What flwr does not promise to keep, and `fedsim flower run` needs: to be run with each version that is supported."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsim import flower_cli
from fedsim.flower.foreign import private
from fedsim.flower.foreign.grid import SimGrid
from tests.fedsim.console import fedsim

ROOT = Path(__file__).parents[2]
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}


def imported(path: Path) -> Iterator[str]:
    """Modules of flwr that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in names if name.split(".")[0] == "flwr")


def test_one_file_alone_takes_private_names() -> None:
    for path in (ROOT / "fedsim" / "flower" / "foreign").glob("*.py"):
        if path.name != "private.py":
            assert set(imported(path)) <= PUBLIC, path


@pytest.mark.parametrize("function", [private.older.fit_clients, private.older.evaluate_clients])
def test_the_older_servers_asking_is_called_as_what_replaces_it(function: object) -> None:
    ours = private._asking(mock.Mock(), "train", mock.Mock(), mock.Mock())
    assert list(inspect.signature(function).parameters) == list(inspect.signature(ours).parameters)  # type: ignore[arg-type]
    called = {node.func.id for node in ast.walk(ast.parse(inspect.getsource(private.older))) if _by_name(node)}  # type: ignore[attr-defined]
    assert function.__name__ in called  # type: ignore[attr-defined]


def _by_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def test_strategies_sleep_where_we_wait() -> None:
    assert "sleep(" in inspect.getsource(private.strategy_utils.sample_nodes)
    assert callable(private.strategy_utils.sleep)


def test_a_grid_has_all_that_flower_asks_of_one() -> None:
    assert not SimGrid.__abstractmethods__
    public = {name for name in vars(Grid) if not name.startswith("_")}
    assert public <= set(dir(SimGrid)) and Grid.__abstractmethods__ <= {n for c in SimGrid.__mro__[:2] for n in vars(c)}


def test_messages_are_made_in_a_run_and_numbered() -> None:
    private.begin_run()
    message = private.number(Message(RecordDict(), 3, "train"), "7")
    assert (message.metadata.message_id, message.metadata.run_id) == ("7", private.RUN_ID)
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "7"


def test_servers_with_and_without_a_main_function_are_told_apart() -> None:
    server = ServerApp()
    assert private.is_older(server)
    server.main()(lambda grid, context: None)
    assert not private.is_older(server)


def test_versions_are_those_of_the_extra_and_others_are_refused() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["flower"]
    (first, beyond) = (".".join(map(str, each)) for each in (flower_cli.FIRST, flower_cli.BEYOND))
    assert extra == [f"flwr>={first},<{beyond}"]
    for found in ("1.38.0", "1.43.0", "2.0.0rc1"):
        with mock.patch.object(flower_cli, "version", lambda name, found=found: found):
            refused = fedsim("flower", "run", ".")
        assert refused.code == 2 and f"flwr {found} is installed, and fedsim was tried with 1.39 to 1.42" in refused.err
    with mock.patch.object(flower_cli, "version", side_effect=flower_cli.PackageNotFoundError("flwr")):
        refused = fedsim("flower", "run", ".")
    assert refused.code == 2 and "Flower is not installed" in refused.err
