"""Nothing that a device says is believed unread: every lie costs its reply, is told with its device, and no more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from fedsim import apps
from fedsim.clients.flower_app import answer
from fedsim.cohort import Cohort
from fedsim.compose import compose
from fedsim.compress import COMPRESSORS
from fedsim.compress.packet import Compressor
from fedsim.flower import wire
from fedsim.flower.client import app_of
from fedsim.flower.clock import Patience
from fedsim.flower.door import Door, Forms
from fedsim.flower.fleet import FlowerFleet
from fedsim.flower.mail import Mail
from fedsim.flower.nodes import connect
from fedsim.overrides import apply_overrides
from fedsim.report.devices import devices_section
from fedsim.sim.executor import ClientError, StackRunner
from fedsim.sim.links import Uplink
from tests.build import quadratic, train
from tests.fedsim.flower.hostile import HostileGrid, Lie, array, head, instead, logged
from tests.fedsim.flower.local_grid import VirtualClock
from tests.fedsim.flower.test_apps import N, experiment

NUM, P, LIAR = 4, 8, 2
ALL, X = torch.arange(NUM), torch.arange(8.0)
NODE = (LIAR + 1) * 7919 % 104729 + 1
PATIENCE = Patience(reply_seconds=60.0, poll_seconds=0.1)
FLOATS = np.ones(2 * P, dtype="<f4")
PACKETS: dict[str, Compressor] = {
    "bernoulli": COMPRESSORS["bernoulli"](p=1.0),
    "top_k": COMPRESSORS["top_k"](k=3),
    "rand_k": COMPRESSORS["rand_k"](k=3, shared_seed=True),
}


@dataclass(frozen=True)
class Halves:
    """Honest ones."""

    def update(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        clients.log(train_loss=clients.ids.double())
        return {"delta": x + clients.ids[:, None].to(x), "steps": torch.ones(len(clients))}

    def score(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        return {
            "examples": clients.num_examples,
            "personal_loss": clients.ids.double(),
            "personal_f1": x[:1] * torch.nan,
        }


HALVES = Halves()


def build(lies: dict[int, Lie], compressor: Compressor | None = None) -> tuple[FlowerFleet, HostileGrid]:
    task = quadratic([1.0] * NUM, [0.0] * NUM, 1.0, num_examples=[4, 3, 2, 1])
    runner = StackRunner(
        task, HALVES, 0, torch.device("cpu"), None if compressor is None else Uplink(compressor=compressor)
    )
    book = wire.Book({} if compressor is None else {"uplink": compressor})
    clock = VirtualClock()
    grid = HostileGrid(app_of(partial(answer, lambda context: (runner, book, {}))), NUM, clock=clock)
    grid.lies = lies
    door = Door(book=book, seed=0, model_size=P)
    mail = Mail(grid, connect(grid, NUM, door, clock, PATIENCE), door, clock, PATIENCE)
    return FlowerFleet(mail, seed=0, model_size=P), grid


LIES: dict[str, tuple[Lie, str]] = {
    "one entry for a vector": (array("delta", FLOATS[:1].tobytes(), (1, 1)), "0 vectors of 8 entries"),
    "a number for a vector": (array("delta", FLOATS[:1].tobytes(), ()), "0 vectors of 8 entries"),
    "two rows": (array("delta", FLOATS.tobytes(), (2, P)), r"has the shape \[2, 8\] and needs one row"),
    "no tensor": (instead(wire.TENSORS, ArrayRecord()), "0 vectors of 8 entries"),
    "another name": (
        array("d", FLOATS[:P].tobytes(), (1, P), only=True),
        "not the fields, shapes and metrics that most",
    ),
    "one field more": (array("more", FLOATS[:P].tobytes(), (1, P)), "not the fields, shapes and metrics that most"),
    "another type": (array("delta", bytes(8 * P), (1, P), "float64"), "not the fields, shapes and metrics that most"),
    "a vector of integers": (array("delta", bytes(4 * P), (1, P), "int32"), "they need a floating dtype"),
    "a type of nobody's": (array("delta", b"", (0,), "quint8"), "an array of type 'quint8' arrived"),
    "bytes too few": (array("delta", b"abc", (1, P)), "takes 32 bytes and 3 arrived"),
    "an overflowing shape": (array("delta", b"", (2**32, 2**32)), "no tensor has it"),
    "a negative shape": (array("delta", b"", (-1, 0)), "no tensor has it"),
    "not a number": (array("delta", b"\0\0\xc0\x7f" * P, (1, P)), "'delta' is not finite"),
    "infinity": (array("delta", b"\0\0\x80\x7f" + bytes(4 * P - 4), (1, P)), "'delta' is not finite"),
    "a loss that is none": (array("steps", b"\0\0\xc0\x7f", (1,)), "'steps' is not finite"),
    "another's job": (head(client=1), "job 0 of client 2 .* was answered by job 0 of client 1"),
    "another job": (head(number=7), r"job 0 of client 2 \(update\) was answered by job 7"),
    "another work": (head(work="score" * 99), "was answered by job 0 of client 2 .*'scorescor"),
    "a round to come": (head(round=7), "was answered"),
    "text for a number": (head(number="0"), "the head of the message is"),
    "memory from nowhere": (head(version=9), "wrote its memory 9 times, and had written it 0"),
    "no head": (lambda content: content.pop(wire.HEAD), "and a reply holds fedsim.head"),
    "one record more": (instead("more", ConfigRecord()), "and a reply holds fedsim.head"),
    "a record of another kind": (instead(wire.TENSORS, MetricRecord()), "and a reply holds"),
    "numbers for tensors": (
        instead(wire.NUMBERS, ConfigRecord({"delta": 1.0})),
        "a reply is tensors and packets alone",
    ),
    "a name for nothing": (instead(wire.NOTHING, ConfigRecord({"names": ["delta"]})), "tensors and packets alone"),
    "names that are a number": (instead(wire.NOTHING, ConfigRecord({"names": 3})), "tensors and packets alone"),
    "the server's round": (logged(round=3), "metric 'round' is reserved"),
    "the server's accuracy": (logged(test_accuracy=1.0), "metric 'test_accuracy' is reserved"),
    "a metric of its own": (logged(mine=1.0), "not the fields, shapes and metrics that most"),
    "a metric that is not finite": (logged(train_loss=float("nan")), "metric 'train_loss' is nan"),
    "a metric that is a list": (logged(train_loss=[1.0, 2.0]), r"metric 'train_loss' is \[1.0, 2.0\]"),
    "a packet where nothing compresses": (
        array("delta", b"\0", (P,), "uint8", f"{wire.PACKET}/uplink"),
        "does not know",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_costs_its_reply_names_its_device_and_is_counted(name: str) -> None:
    lie, why = LIES[name]
    fleet, grid = build({LIAR: lie})
    with pytest.warns(
        UserWarning, match=rf"client 2 \(node {NODE}\), update of round 1: its reply is refused, .*{why}"
    ):
        r = fleet.ask(ALL, HALVES.update, x=X)
    assert r.ids.tolist() == [0, 1, 3] and torch.equal(r["delta"], X + torch.tensor([[0.0], [1.0], [3.0]]))
    assert fleet.devices()["refused"].tolist() == [0, 0, 1, 0]
    row = fleet.end_round().values()
    assert row == {"train_loss": pytest.approx(6 / 8), "num_clients": 3, "num_refused": 1}
    grid.lies = {}
    assert fleet.ask(ALL, HALVES.update, x=X).ids.tolist() == [0, 1, 2, 3]


BOMBS: dict[str, tuple[str, Lie, str]] = {
    "one byte for a billion": (
        "bernoulli",
        array("delta", b"\0", (10**9,), "uint8", "fedsim.packet/uplink"),
        "8 is the lon",
    ),
    "39 bytes for a billion": (
        "top_k",
        array("delta", bytes(39), (10**9,), "uint8", "fedsim.packet/uplink"),
        "8 is the lon",
    ),
    "of two shapes": ("top_k", array("delta", bytes(14), (P, P), "uint8", "fedsim.packet/uplink"), "8 is the longest"),
    "of no entries": ("bernoulli", array("delta", b"\0", (0,), "uint8", "fedsim.packet/uplink"), "8 is the longest"),
    "an index twice": ("top_k", array("delta", bytes(14), (P,), "uint8", "fedsim.packet/uplink"), "in ascending order"),
    "cut short": ("top_k", array("delta", bytes(13), (P,), "uint8", "fedsim.packet/uplink"), "cut short"),
    "of another's compressor": ("top_k", array("delta", b"", (P,), "uint8", "fedsim.packet/mine"), "does not know"),
    "with a key": ("top_k", array("delta", bytes(14), (P,), "uint8", "fedsim.packet/uplink@0,2,0,0"), "needs none"),
    "without its key": ("rand_k", array("delta", bytes(12), (P,), "uint8", "fedsim.packet/uplink"), "without the key"),
    "with half a key": (
        "rand_k",
        array("delta", bytes(12), (P,), "uint8", "fedsim.packet/uplink@1,2"),
        "without the key",
    ),
    "another's key": (
        "rand_k",
        array("delta", bytes(12), (P,), "uint8", "fedsim.packet/uplink@0,1,0,0"),
        "not its sender's",
    ),
    "a huge key": (
        "rand_k",
        array("delta", bytes(12), (P,), "uint8", f"fedsim.packet/uplink@{9**20},1,0,0"),
        "without the",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_packet_is_measured_against_the_model_before_it_is_decoded(name: str) -> None:
    compressor, lie, why = BOMBS[name]
    fleet, _ = build({LIAR: lie}, PACKETS[compressor])
    with pytest.warns(
        UserWarning, match=rf"client 2 \(node {NODE}\), update of round 1: its reply is refused, .*{why}"
    ):
        r = fleet.ask(ALL, HALVES.update, x=X)
    assert r.ids.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    "values",
    [
        {"examples": -1.0},
        {"examples": 1e18},
        {"examples": float("nan")},
        {"personal_loss": float("nan")},
        {"personal_f1": float("inf")},
        {"global_loss": 1.0},
    ],
)
def test_scores_are_numbers_of_so_many_samples(values: dict[str, float]) -> None:
    ((name, value),) = values.items()
    fleet, _ = build({LIAR: array(name, np.array([value]).tobytes(), (1,), "float64")})
    with pytest.warns(UserWarning) as said:
        found = fleet.evaluate(ALL, HALVES.score, x=X)
    assert found["examples"].nan_to_num(-1.0).tolist() == [4.0, 3.0, -1.0, 1.0] and set(found) >= {"personal_loss"}
    assert any(f"client 2 (node {NODE}), score of round 1: its reply is refused" in str(w.message) for w in said)


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"client": 99, "num_examples": 1}, r"it says it is client 99, and clients are 0\.\.3"),
        ({"client": "two", "num_examples": 1}, "it says it is client 'two'"),
        ({"client": True, "num_examples": 1}, "it says it is client True"),
        ({"client": 2, "num_examples": "many"}, "client 2 and has 'many' samples"),
        ({"client": 2, "num_examples": 10**18}, r"has 1000000000000000000 samples; a device has 0\.\.10000000, or set"),
        ({"client": 2, "num_examples": -1}, "has -1 samples"),
        ({"client": 2}, "and not which client it is"),
    ],
)
def test_a_node_that_says_of_itself_what_cannot_be_is_named(about: dict[str, Any], why: str) -> None:
    class Posing(HostileGrid):
        def _answer(self, message: Any, context: Any) -> Any:
            reply = super()._answer(message, context)
            if context.node_id == NODE:
                reply.content[wire.ABOUT] = ConfigRecord(about)
            return reply

    runner = StackRunner(quadratic([1.0] * NUM, [0.0] * NUM, 1.0), HALVES, 0, torch.device("cpu"))
    grid = Posing(app_of(partial(answer, lambda context: (runner, wire.Book({}), {}))), NUM)
    with pytest.raises(ClientError, match=rf"^node {NODE}: .*{why}"):
        connect(grid, NUM, Door(book=wire.Book({}), seed=0, model_size=P), VirtualClock(), PATIENCE)


def test_where_replies_differ_most_devices_are_right_however_often_one_speaks() -> None:
    forms = Forms()
    for _ in range(9):
        forms.note(("q",), ("odd",), 2)
    assert forms.usual(("q",), ("odd",)) and forms.usual(("another",), ("whatever",))
    for client in (0, 1):
        forms.note(("q",), ("plain",), client)
    assert forms.usual(("q",), ("plain",)) and not forms.usual(("q",), ("odd",))
    for k in range(99):
        forms.note((k,), ("plain",), 0)
    assert [*forms.seen] == [(k,) for k in range(35, 99)]  # a long run asks many questions


def test_a_client_without_samples_may_say_that_it_has_no_loss() -> None:
    fleet, grid = build({LIAR: logged(train_loss=float("nan"))})
    fleet.mail.nodes.num_examples[LIAR] = 0
    assert fleet.ask(ALL, HALVES.update, x=X).ids.tolist() == [0, 1, 2, 3]
    assert fleet.end_round().values()["train_loss"] == pytest.approx(6 / 8)


@pytest.mark.filterwarnings("ignore:client 2")
def test_a_run_with_a_liar_is_the_run_without_it_and_its_folder_says_who_that_was(tmp_path: Path) -> None:
    raw = {**experiment("fedavg, by samples"), "strategy": {"name": "fedavg"}}
    clock = VirtualClock()
    grid = HostileGrid(apps.client_app(raw), N, clock=clock)
    grid.lies = {LIAR: logged(round=1, test_accuracy=1.0, mine=3.0)}
    got = apps.serve(grid, raw, {"fedsim-out": str(tmp_path / "run")}, clock).rows
    grid = HostileGrid(apps.client_app(raw), N, clock=clock)
    composition = compose(apply_overrides(raw, apps.DEPLOYED, "config"), "config")
    composition.experiment.fleet = apps.deploy(composition, grid, PATIENCE, clock)
    grid.gone = {LIAR}  # once all were there
    without = train(composition.experiment)[1]
    composition.close()
    assert [row["x"] for row in got] == [row["x"] for row in without]
    assert [(row["round"], row["num_refused"], "mine" in row) for row in got] == [(k, 1, False) for k in (1, 2, 3, 4)]
    devices = [json.loads(line) for line in (tmp_path / "run" / "devices.jsonl").read_text().splitlines()]
    assert [(d["client"], d["replied"], d["refused"]) for d in devices] == [
        (i, 0 if i == LIAR else 4, 4 if i == LIAR else 0) for i in range(N)
    ]
    section = devices_section(tmp_path / "run")
    assert section is not None and section.table is not None
    assert section.table.rows[0][0] == str(LIAR), "whose jobs were lost stands first"


def test_a_limit_of_samples_is_a_setting_of_the_run() -> None:
    raw = experiment("fedavg")
    for wrong in (0, "many", 2**60):
        with pytest.raises(apps.ConfigError, match="fedsim-max-examples: .* is no number of samples"):
            apps.serve(HostileGrid(apps.client_app(raw), N), raw, {"fedsim-max-examples": wrong})
