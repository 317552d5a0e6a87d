"""The names of flwr that it does not promise to keep, in one place; tests hold that they exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.config import get_fused_config_from_dir, get_project_config
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.common.typing import Code
from flwr.compat.common import recorddict_compat as compat
from flwr.proto.recorddict_pb2 import RecordDict as RecordProto
from flwr.server import server as older
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import strategy_utils
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_ID = SUPERLINK_NODE_ID
RAISED, EXPIRED, UNAVAILABLE = (
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)


class LoadError(Exception):
    """The app's objects are not where its pyproject.toml says."""


class OwnGrid(Grid):
    """What all grids inside this process have."""

    def __init__(self) -> None:
        begin_run()
        self._run = Run.create_empty(RUN_ID)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


def begin_run() -> None:
    """This process is a run's server from now on: messages are made in its name."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_ID


def components(folder: Path) -> dict[str, str]:
    """{serverapp, clientapp: import path} of an app's pyproject.toml.

    Raises:
        FileNotFoundError, ValueError: if there is none, or Flower finds a mistake in it.
    """
    return dict(get_project_config(folder)["tool"]["flwr"]["app"]["components"])


def run_config(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The app's own settings, flat, with some of them replaced.

    Raises:
        ValueError: for a setting that the app has not.
    """
    return dict(get_fused_config_from_dir(folder, overrides))


def load(reference: str, folder: Path, kind: type[ServerApp] | type[ClientApp]) -> Any:
    """The object that a component names.

    Raises:
        LoadError: if there is none of this kind; and whatever importing the app raises.
    """
    found = load_app(reference, LoadError, folder)
    if not isinstance(found, kind):
        raise LoadError(f"{reference} is a {type(found).__name__}, not a {kind.__name__}")
    return found


def is_older(server: ServerApp) -> bool:
    """Whether an app's server is made of ServerAppComponents, and has no main function."""
    return server._main is None


def pack(record: RecordDict) -> bytes:
    """A record as Flower sends it."""
    return bytes(recorddict_to_proto(record).SerializeToString(deterministic=True))


def unpack(data: bytes) -> RecordDict:
    """The record again, which shares nothing with the one that was packed."""
    return recorddict_from_proto(RecordProto.FromString(data))


def number(message: Message, message_id: str) -> Message:
    """Give a message its id, as a SuperLink does."""
    message.metadata.__dict__["_message_id"] = message_id
    return message


@contextmanager
def on_our_clock(grid: Grid, wait_for_nodes: Callable[[], None]) -> Iterator[None]:
    """What two parts of Flower do by the wall clock and by threads, done in order and in virtual time.

    Its strategies sleep until there are nodes enough: in here they wait as the grid does. Its older server asks clients
    from threads and takes their answers as a set, in no order: in here it sends all messages of a round at once and
    takes the answers in the order of its clients.
    """
    fit = _asking(grid, MessageType.TRAIN, compat.fitins_to_recorddict, _fit_result)
    evaluate = _asking(grid, MessageType.EVALUATE, compat.evaluateins_to_recorddict, compat.recorddict_to_evaluateres)
    with (
        mock.patch.multiple(older, fit_clients=fit, evaluate_clients=evaluate),
        mock.patch.object(strategy_utils, "sleep", lambda seconds: wait_for_nodes()),
    ):
        yield


def _fit_result(record: RecordDict) -> Any:
    return compat.recorddict_to_fitres(record, keep_input=False)


def _asking(
    grid: Grid, kind: str, written: Callable[..., RecordDict], read: Callable[[RecordDict], Any]
) -> Callable[..., tuple[list[Any], list[Any]]]:
    """What replaces the older server's function for this kind of message."""

    def ask(
        client_instructions: Sequence[tuple[Any, Any]], max_workers: int | None, timeout: float | None, group_id: int
    ) -> tuple[list[Any], list[Any]]:
        messages = [
            Message(written(ins, keep_input=True), proxy.node_id, kind, ttl=timeout, group_id=str(group_id))
            for proxy, ins in client_instructions
        ]
        replies = {reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(messages)}
        results: list[Any] = []
        failures: list[Any] = []
        for (proxy, _), message in zip(client_instructions, messages, strict=True):
            reply = replies[message.metadata.message_id]
            if reply.has_error():
                failures.append(ValueError(f"Message contains an Error (reason: {reply.error.reason})."))
                continue
            result = read(reply.content)
            (results if result.status.code == Code.OK else failures).append((proxy, result))
        return results, failures

    return ask
