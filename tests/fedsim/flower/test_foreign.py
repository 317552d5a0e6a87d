"""Unmodified Flower apps, simulated: the same numbers as Flower's rules say, every time."""

from __future__ import annotations

import gc
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import strategy_utils

from fedsim.flower.foreign.app import App
from fedsim.flower.foreign.clocks import Clocks
from fedsim.flower.foreign.grid import SimGrid
from fedsim.flower.foreign.nodes import NOTHING_KEPT, Answer, Job, NodeRunner, seeded
from fedsim.flower.foreign.private import EXPIRED, RAISED, UNAVAILABLE, on_our_clock, pack
from fedsim.flower.foreign.rounds import RoundLog
from fedsim.flower.foreign.workers import NodeActor, NodeSetting
from fedsim.history import History
from fedsim.sim import packing
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.availability import Bernoulli
from fedsim.sim.devices import FX, Constant, Devices
from fedsim.sim.ray_pool import WorkersLost
from fedsim.streams import Streams
from tests.fedsim.console import fedsim

APPS = Path(__file__).parents[2] / "flower_apps"
MESSAGE, NUMPY = APPS / "message_app", APPS / "numpy_app"
ALWAYS = Absence()


@pytest.fixture(autouse=True)
def own_threads_and_path() -> Iterator[None]:
    threads, path = torch.get_num_threads(), list(sys.path)
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path


def played(app: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of a run, wall time aside."""
    found = fedsim("flower", "run", app, "--out", out, "--quiet", "clients.count=6", *overrides)
    assert found.code == 0, found.err
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in History.load(out).rows]


@pytest.mark.parametrize("app", [MESSAGE, NUMPY], ids=["Message API", "NumPyClient"])
def test_a_run_is_the_same_every_time_and_another_under_another_seed(app: Path, tmp_path: Path) -> None:
    first = played(app, tmp_path / "a")
    random.random(), np.random.rand(), torch.rand(1)
    assert played(app, tmp_path / "b") == first
    assert played(app, tmp_path / "c", "seed=1") != first
    assert [row["round"] for row in first] == [1, 2] and all(row["errors"] == 0 for row in first)
    assert (tmp_path / "a" / "report.html").is_file()


def test_what_a_client_draws_depends_on_it_and_its_message_alone(tmp_path: Path) -> None:
    """With all clients in each round, one that fails takes no number away from the others."""
    all_of_them = ("run_config.fraction-train=1.0", "run_config.num-server-rounds=1")
    whole = played(MESSAGE, tmp_path / "whole", *all_of_them)
    one_less = played(MESSAGE, tmp_path / "less", *all_of_them, "run_config.fail='6'")
    with seeded(0, "flower client 6"):
        torch.randperm(8)
        drawn = random.random()
    assert 6 * whole[0]["train.drawn"] - 5 * one_less[0]["train.drawn"] == pytest.approx(drawn)


def test_each_message_of_a_client_has_a_key_of_its_own(tmp_path: Path) -> None:
    """A client's messages are train 0, evaluate 1, train 2; so the second round draws with key 2."""
    rows = played(MESSAGE, tmp_path / "run", "run_config.fraction-train=1.0")
    drawn = []
    for node in range(1, 7):
        with seeded(0, f"flower client {node}", 2):
            drawn.append(random.random())
    assert rows[1]["train.drawn"] == pytest.approx(sum(drawn) / 6)


def test_one_round_is_the_step_and_the_mean_worked_out_from_what_clients_draw(tmp_path: Path) -> None:
    """From w = 0 client p steps to lr (1 + p) a_p, with a_p the mean of x^2 over the four points that it drew."""
    rows = played(MESSAGE, tmp_path / "run", "run_config.fraction-train=1.0", "run_config.num-server-rounds=1")
    x = torch.linspace(-1, 1, 8)
    models = []
    for p in range(6):
        with seeded(0, f"flower client {p + 1}"):
            models.append(0.1 * (1 + p) * float((x[torch.randperm(8)[:4]] ** 2).mean()))
    w = sum(models) / 6
    expected = float((x**2).mean()) * sum((w - (1 + p)) ** 2 for p in range(6)) / 6
    assert rows[0]["evaluate.eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_context_state_stays_with_its_client(tmp_path: Path) -> None:
    rows = played(MESSAGE, tmp_path / "run", "run_config.fraction-train=1.0", "run_config.num-server-rounds=3")
    assert [row["train.trained"] for row in rows] == [1, 2, 3]


NO_ARRAYS_OF_NUMBERS = {"FedXgbBagging", "FedXgbCyclic"}  # they send trees of xgboost
STRATEGIES = set(strategies.__all__) - {"Result", "Strategy"} - NO_ARRAYS_OF_NUMBERS


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_strategies_of_flower_run_their_mods_included(name: str, tmp_path: Path) -> None:
    rows = played(MESSAGE, tmp_path / "run", f"run_config.strategy={name}", "run_config.fraction-train=1.0")
    assert [(row["replies"], row["errors"]) for row in rows] == [(12, 0), (12, 0)]


def test_an_exception_of_a_client_is_an_error_with_its_traceback(tmp_path: Path) -> None:
    some = ["clients.count=4", "run_config.fraction-train=1.0", "run_config.num-server-rounds=1"]
    found = fedsim("flower", "run", MESSAGE, "--out", tmp_path / "run", "-q", *some, "run_config.fail='2'")
    assert found.code == 0 and "client 1 raised" in found.err and 'raise KeyError("no data' in found.err
    (row,) = History.load(tmp_path / "run").rows
    assert (row["messages"], row["replies"], row["errors"]) == (8, 6, 2)


def test_a_run_in_which_every_client_fails_is_a_failed_run(tmp_path: Path) -> None:
    lost = [
        "clients.count=2",
        "run_config.fraction-train=1.0",
        "run_config.fail='1 2'",
        "run_config.num-server-rounds=1",
    ]
    found = fedsim("flower", "run", MESSAGE, "--out", tmp_path / "run", "-q", *lost)
    assert found.code == 1, found.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "holds no pyproject.toml"),
        ([MESSAGE, "run_config.rounds=3"], "'rounds' is not present"),
        ([MESSAGE, "clients.cout=3"], "did you mean 'count'"),
        ([MESSAGE, "clients.count=0"], "count must be at least 1"),
        ([MESSAGE, "clients.devices=quick"], "unknown name 'quick'"),
        ([MESSAGE, "clients.steps.train=-1"], "train must be 0 or more"),
    ],
)
def test_mistakes_are_one_message(arguments: list[Any], words: str, tmp_path: Path) -> None:
    found = fedsim("flower", "run", *arguments, "--out", tmp_path / "run")
    assert found.code == 2 and words in found.err and "Traceback" not in found.err
    assert not (tmp_path / "run").exists()


def test_a_server_that_raises_ends_the_run_with_its_exception(tmp_path: Path) -> None:
    found = fedsim("flower", "run", MESSAGE, "--out", tmp_path / "run", "-q", "run_config.strategy=FedNothing")
    assert found.code == 1 and "its ServerApp failed before its first round" in found.err
    assert "Traceback" in found.err and "FedNothing" in found.err


def test_a_server_that_leaves_by_itself_has_not_run_to_its_end(tmp_path: Path) -> None:
    with mock.patch.object(ServerApp, "__call__", side_effect=SystemExit(0)):
        found = fedsim("flower", "run", MESSAGE, "--out", tmp_path / "run", "-q")
    assert found.code == 1 and "its ServerApp failed before its first round: SystemExit: 0" in found.err


def test_a_run_can_be_run_again_from_its_own_file(tmp_path: Path) -> None:
    first = played(MESSAGE, tmp_path / "a", "clients.devices=lognormal", "run_config.num-server-rounds=1")
    assert played(MESSAGE, tmp_path / "b", "--config", str(tmp_path / "a" / "config.yaml")) == first


echo = ClientApp()


@echo.train()
def _(message: Message, context: Any) -> Message:
    context.state["mine"] = ConfigRecord({"message": message.metadata.message_id})
    assert "bad" not in message.content
    if "exit" in message.content:
        sys.exit("enough")
    message.content["mine"] = ConfigRecord({"node": context.node_id})
    return Message(message.content, reply_to=message)


def grid_of(devices: Devices, count: int = 3, absence: Absence = ALWAYS) -> tuple[SimGrid, list[dict[str, Any]]]:
    """A grid of echoing clients, and the rows that it will have written."""
    rows: list[dict[str, Any]] = []
    log = RoundLog(lambda row: rows.append(dict(row)))
    clocks = Clocks(count=count, devices=devices, absence=absence)
    return SimGrid(NodeRunner(echo, count, {}, 0).answers, clocks, log, lambda node, reason: None), rows


def asks(*nodes: int, **keys: Any) -> list[Message]:
    return [Message(RecordDict(), node, "train", **keys) for node in nodes]


def test_replies_come_in_the_order_of_virtual_time_however_fast_an_app_polls() -> None:
    """F-80 clocks of 3 clients take 1, 0.6 and 0.2 seconds; node 3, asked twice, is done after 0.4."""
    grid, _ = grid_of(FX(x=80, count=3))
    ids = [*grid.push_messages(asks(1, 2, 3)), *grid.push_messages(asks(3))]
    came, at = [], []
    while ids:
        for reply in grid.pull_messages(ids):
            ids.remove(reply.metadata.reply_to_message_id)
            came.append(reply.metadata.src_node_id)
            at.append(grid.now)
    assert came == [3, 3, 2, 1] and at == pytest.approx([0.2, 0.4, 0.6, 1.0])


def test_a_timeout_leaves_what_is_late_to_be_pulled() -> None:
    grid, _ = grid_of(FX(x=80, count=3))
    early = grid.send_and_receive(asks(1, 2, 3), timeout=0.7)
    assert [m.metadata.src_node_id for m in early] == [3, 2] and grid.now == pytest.approx(0.7)
    assert [m.metadata.src_node_id for m in grid.pull_messages(["1"])] == [1] and grid.now == pytest.approx(1.0)


def test_messages_that_outlive_their_time_or_have_no_node_are_errors_as_flower_has_them() -> None:
    grid, rows = grid_of(FX(x=80, count=3))
    replies = list(grid.send_and_receive([*asks(1, 3, ttl=0.5), *asks(9)]))
    codes = {m.metadata.reply_to_message_id: m.error.code if m.has_error() else None for m in replies}
    assert codes == {"1": EXPIRED, "2": None, "3": UNAVAILABLE}
    (bad,) = asks(2)
    bad.content["bad"] = ConfigRecord()
    (reply,) = grid.send_and_receive([bad])
    assert reply.error.code == RAISED and "AssertionError" in reply.error.reason
    bad.content["exit"] = bad.content.pop("bad")
    (reply,) = grid.send_and_receive([bad])
    assert reply.error.code == RAISED and "SystemExit: enough" in reply.error.reason
    assert grid.states[2] == NOTHING_KEPT != grid.states[1]


def test_replies_belong_to_their_messages_and_nothing_is_shared() -> None:
    grid, _ = grid_of(Constant())
    shared = RecordDict({"config": ConfigRecord({"lr": 0.1})})
    messages = [Message(shared, node, "train", group_id="7") for node in (1, 2)]
    for message, reply in zip(messages, grid.send_and_receive(messages), strict=True):
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert (reply.metadata.group_id, reply.metadata.dst_node_id) == ("7", message.metadata.src_node_id)
        assert reply.content["mine"]["node"] == message.metadata.dst_node_id
    assert set(shared) == {"config"}  # what clients add to their message is in no other's


def test_a_message_is_what_its_record_was_when_it_was_made() -> None:
    """Also of an app that makes them one by one, changing its record in between."""
    grid, _ = grid_of(Constant())
    record = RecordDict()

    def each() -> Iterator[Message]:
        for node in (1, 2, 3):
            record["c"] = ConfigRecord({"for": node})
            yield Message(record, node, "train")

    replies = grid.send_and_receive(each())
    assert [reply.content["c"]["for"] for reply in replies] == [1, 2, 3]


def test_messages_of_one_push_to_one_node_are_answered_one_after_the_other() -> None:
    heard: list[list[tuple[int, int, bool]]] = []
    clocks = Clocks(count=2, devices=Constant(seconds_per_step=1.0))

    def answers(jobs: Sequence[Job]) -> list[Answer]:
        heard.append([(job.node, job.number, job.state == NOTHING_KEPT) for job in jobs])
        return list(NodeRunner(echo, 2, {}, 0).answers(jobs))

    grid = SimGrid(answers, clocks, RoundLog(lambda row: None), lambda node, reason: None)
    replies = grid.send_and_receive(asks(1, 2, 1, 2, 1))
    assert heard == [[(1, 0, True), (2, 0, True)], [(1, 1, False), (2, 1, False)], [(1, 2, False)]]
    assert len(list(replies)) == 5 and grid.now == 3.0


def test_bits_are_those_of_flowers_serialised_records_and_take_their_time() -> None:
    record = RecordDict({"arrays": ArrayRecord([np.zeros(100, np.float32)]), "m": MetricRecord({"num-examples": 3})})
    down = 8 * len(recorddict_to_proto(record).SerializeToString())
    up = 8 * len(recorddict_to_proto(RecordDict({**record, "mine": ConfigRecord({"node": 1})})).SerializeToString())
    grid, rows = grid_of(Constant(seconds_per_step=0.5, downlink=1000.0, uplink=500.0))
    grid.send_and_receive([Message(record, 1, "train")])
    grid.close()
    assert (rows[0]["bits_down"], rows[0]["bits_up"]) == (down, up)
    assert rows[0]["virtual_seconds"] == pytest.approx(down / 1000 + 0.5 + up / 500)


def test_rounds_are_groups_or_else_server_rounds_or_else_pushes() -> None:
    grid, rows = grid_of(Constant())
    grid.send_and_receive(asks(1, 2, group_id="a"))
    grid.send_and_receive(asks(3, group_id="a"))
    for k in (1, 1, 2):
        grid.send_and_receive([Message(RecordDict({"c": ConfigRecord({"server-round": k})}), 1, "train")])
    grid.send_and_receive(asks(1, 2))
    grid.send_and_receive(asks(1))
    grid.close()
    assert [(row["group"], row["messages"]) for row in rows] == [("a", 3), ("1", 2), ("2", 1), ("", 2), ("", 1)]
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5]
    json.dumps(rows)


def test_numbers_that_clients_report_are_averaged_by_their_samples() -> None:
    rows: list[Any] = []
    log = RoundLog(rows.append)
    log.begin(asks(1)[0], True, 0.0)
    for n, loss in ((1, 2.0), (3, 6.0)):
        log.came("train", 0, RecordDict({"m": MetricRecord({"num-examples": n, "loss": loss})}), dropped=False)
    log.close(1.0)
    assert rows[0]["train.loss"] == (1 * 2.0 + 3 * 6.0) / 4 and "train.num-examples" not in rows[0]


def test_dropped_work_costs_its_share_of_bits_and_leaves_the_client_as_it_was() -> None:
    """Work on a node that dies at a share u of its time has sent u of it, where the upload is all the time there is."""
    absence = Absence(dropout=Dropout(probability=0.5))
    grid, rows = grid_of(Constant(seconds_per_step=0.0, uplink=100.0), count=40, absence=absence)
    replies = {m.metadata.src_node_id: m for m in grid.send_and_receive(asks(*range(1, 41)))}
    grid.close()
    u = Streams(0, torch.arange(40), torch.zeros(40, dtype=torch.int64)).uniform("dropout", 2, dtype=torch.float64)
    died = u[:, 0] < 0.5
    assert [replies[i + 1].has_error() for i in range(40)] == died.tolist() and 10 < died.sum() < 30
    assert all(replies[i + 1].error.code == UNAVAILABLE for i in range(40) if died[i])
    assert [grid.states[i + 1] == NOTHING_KEPT for i in range(40)] == died.tolist()
    one = 8 * len(recorddict_to_proto(RecordDict({"mine": ConfigRecord({"node": 1})})).SerializeToString())
    expected = sum(int(float(u[i, 1]) * one + 1e-9) if died[i] else one for i in range(40))
    assert rows[0]["bits_up"] == pytest.approx(expected, abs=40)
    assert rows[0]["num_dropped"] == int(died.sum()) and rows[0]["replies"] == 40 - int(died.sum())


def test_nodes_that_are_away_are_not_listed_and_waiting_for_them_takes_virtual_time() -> None:
    law = Bernoulli(p=0.5, seconds=10.0)
    grid, rows = grid_of(Constant(), count=8, absence=Absence(availability=law))
    for slot in range(4):
        expected = [i + 1 for i in range(8) if law.on_line(0, torch.tensor([i]), 10.0 * slot)]
        assert list(grid.get_node_ids()) == expected and grid.now == 10.0 * slot
        grid.wait_for_nodes()
    away = ({*range(1, 9)} - {*grid.get_node_ids()}).pop()
    (reply,) = grid.send_and_receive([Message(RecordDict({"c": ConfigRecord({"lr": 0.1})}), away, "train")])
    assert reply.error.code == UNAVAILABLE and grid.now == 40.0
    grid.close()
    assert (rows[0]["bits_down"], rows[0]["bits_up"], rows[0]["num_dropped"]) == (0, 0, 1)


def test_a_strategy_waits_for_nodes_on_the_virtual_clock_and_not_for_ever() -> None:
    law = Bernoulli(p=0.5, seconds=10.0)
    grid, _ = grid_of(Constant(), count=4, absence=Absence(availability=law))
    slot = next(s for s in range(1000) if law.on_line(0, torch.arange(4), 10.0 * s).all())
    with on_our_clock(grid, grid.wait_for_nodes):
        nodes, _ = strategy_utils.sample_nodes(grid, 4, 2)
    assert slot > 0 and grid.now == 10.0 * slot and set(nodes) < {1, 2, 3, 4}
    always, _ = grid_of(Constant(), count=4)
    with on_our_clock(always, always.wait_for_nodes), pytest.raises(ValueError, match="more clients than the 4 of 4"):
        strategy_utils.sample_nodes(always, 5, 2)


def test_work_ends_when_its_node_leaves() -> None:
    """A job of 100 seconds never outlives slots of 10 seconds for a node that is off line within them."""
    law = Bernoulli(p=0.5, seconds=10.0)
    grid, _ = grid_of(Constant(seconds_per_step=100.0), count=8, absence=Absence(availability=law))
    node = next(iter(grid.get_node_ids()))
    leaves = next(s for s in range(1, 10) if not law.on_line(0, torch.tensor([node - 1]), 10.0 * s))
    (reply,) = grid.send_and_receive(asks(node))
    assert reply.error.code == UNAVAILABLE and grid.now == pytest.approx(10.0 * leaves)


def test_an_app_with_absent_and_failing_clients_is_the_same_every_time(tmp_path: Path) -> None:
    rough = ["clients.dropout.probability=0.3", "clients.availability={name: bernoulli, p: 0.8}", "clients.count=12"]
    first = played(MESSAGE, tmp_path / "a", *rough)
    assert played(MESSAGE, tmp_path / "b", *rough) == first
    assert sum(row.get("num_dropped", 0) for row in first) > 0
    found = fedsim("flower", "run", NUMPY, "--out", tmp_path / "c", *rough)
    assert found.code == 2 and "ServerAppComponents" in found.err


class Broken(BaseException):
    """What ends a process from outside, as far as Python sees it."""


def broken_off(app: Path, out: Path, after: int, *overrides: str) -> None:
    """A run that ends when its clients have had so many messages."""
    answer = NodeRunner.answer
    calls = itertools.count()

    def breaks(self: NodeRunner, job: Job) -> Answer:
        if next(calls) == after:
            raise Broken
        return answer(self, job)

    with mock.patch.object(NodeRunner, "answer", breaks), pytest.raises(Broken):
        fedsim("flower", "run", app, "--out", out, "--quiet", "clients.count=6", *overrides)


@pytest.mark.parametrize("app", [MESSAGE, NUMPY], ids=["Message API", "NumPyClient"])
def test_a_run_that_broke_off_goes_on_to_the_same_rows_without_computing_what_it_had(app: Path, tmp_path: Path) -> None:
    whole = played(app, tmp_path / "whole")
    broken_off(app, tmp_path / "run", 11)
    with (tmp_path / "run" / "replies.bin").open("ab") as file:
        file.write(b'{"key": "half a fra')  # as a kill leaves it
    with mock.patch.object(NodeRunner, "answer", autospec=True, side_effect=NodeRunner.answer) as answer:
        assert played(app, tmp_path / "run", "--resume") == whole
    assert answer.call_count == sum(row["messages"] for row in whole) - 11
    assert not (tmp_path / "run" / "replies.bin").exists() and (tmp_path / "run" / "summary.json").exists()
    found = fedsim("flower", "run", app, "--out", tmp_path / "run", "--resume", "clients.count=6")
    assert found.code == 2 and "complete" in found.err


def test_replies_are_not_kept_where_they_are_not_wanted(tmp_path: Path) -> None:
    broken_off(MESSAGE, tmp_path / "run", 11, "keep=false")
    assert not (tmp_path / "run" / "replies.bin").exists()


def test_a_damaged_reply_is_computed_again(tmp_path: Path) -> None:
    whole = played(MESSAGE, tmp_path / "whole")
    broken_off(MESSAGE, tmp_path / "run", 11)
    file = tmp_path / "run" / "replies.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert played(MESSAGE, tmp_path / "run", "--resume") == whole


@pytest.mark.parametrize("other", ["seed=1", "run_config.lr=0.2", "clients.count=7"])
def test_a_resume_of_another_run_is_refused(other: str, tmp_path: Path) -> None:
    broken_off(MESSAGE, tmp_path / "run", 11)
    before = (tmp_path / "run" / "replies.bin").read_bytes(), (tmp_path / "run" / "config.yaml").read_bytes()
    found = fedsim("flower", "run", MESSAGE, "--out", tmp_path / "run", "--resume", "-q", "clients.count=6", other)
    assert found.code == 2 and "is not the one that the app sent before" in found.err, found.err
    assert before == ((tmp_path / "run" / "replies.bin").read_bytes(), (tmp_path / "run" / "config.yaml").read_bytes())


def test_a_worker_answers_as_this_process_does_and_says_why_it_cannot_load_an_app() -> None:
    settings = {"lr": 0.1, "fail": "", "strategy": "FedAvg"}
    content = pack(RecordDict({"arrays": ArrayRecord({"w": torch.zeros(1)}), "config": ConfigRecord({"lr": 0.1})}))
    jobs = [Job(node, 2, str(node), "train", "1", 9.0, content, NOTHING_KEPT) for node in (3, 1)]
    setting = NodeSetting(MESSAGE, "quick.client_app:app", 4, settings, seed=5)
    actor = NodeActor(torch.get_num_threads())
    parcel = packing.pack(setting)
    try:
        assert actor.ready(parcel) is None
        found = packing.unpack(actor.run(parcel, packing.pack(jobs)))
        app = App.load(MESSAGE, {}).client
    finally:
        gc.unfreeze()
    assert found == list(NodeRunner(app, 4, settings, 5).answers(jobs)) and found[0].content != found[1].content
    failed = NodeActor(1).ready(packing.pack(replace(setting, reference="quick.client_app:nothing")))
    assert (
        failed is not None
        and isinstance(failed.error, WorkersLost)
        and "a Ray worker can't load the app: LoadError" in str(failed.error)
    )
