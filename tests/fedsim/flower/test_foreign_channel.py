"""Compressed links and byzantine clients of Flower apps: numbers worked out by hand, and our own strategies'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim.clients.byzantine import Alie, Infinity, SignFlip, Silence
from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.sparsify import RandK, TopK
from fedsim.config import ConfigError
from fedsim.flower.foreign.channel import Channel
from fedsim.flower.foreign.clocks import Clocks
from fedsim.flower.foreign.grid import SimGrid
from fedsim.flower.foreign.nodes import NodeRunner
from fedsim.flower.foreign.private import UNAVAILABLE, pack
from fedsim.flower.foreign.rounds import RoundLog
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.byzantine import Byzantine
from fedsim.sim.devices import Constant
from tests.fedsim.console import fedsim
from tests.fedsim.flower.test_foreign import MESSAGE, NUMPY, broken_off, own_threads_and_path, played

__all__ = ["own_threads_and_path"]  # a fixture for each test

Row = list[float]


def answering(change: Callable[[int, int], Row]) -> ClientApp:
    """A client that adds `change(node, how often it was asked)` to the arrays that it is sent, or else replies that."""
    app = ClientApp()

    @app.train()
    def _(message: Message, context: Context) -> Message:
        asked = int(context.state["m"]["asked"]) if "m" in context.state else 0
        context.state["m"] = MetricRecord({"asked": asked + 1})
        value = np.array(change(context.node_id, asked), np.float32)
        if "arrays" in message.content:
            value = value + message.content["arrays"]["x"].numpy()
        steps = np.array(3)  # as BatchNorm counts batches
        arrays = ArrayRecord([value, steps], keep_input=True)
        arrays = ArrayRecord({"x": arrays["0"], "steps": arrays["1"]})
        return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def grid_of(
    app: ClientApp, count: int, absence: Absence | None = None, **channel: Any
) -> tuple[SimGrid, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    clocks = Clocks(count=count, devices=Constant(), absence=absence or Absence())
    log = RoundLog(lambda row: rows.append(dict(row)))
    made = Channel(count=count, **channel)
    return SimGrid(NodeRunner(app, count, {}, 0).answers, clocks, log, lambda node, reason: None, made), rows


def told(*nodes: int, x: Row | None = None) -> list[Message]:
    content = RecordDict({"c": ConfigRecord({"lr": 0.1})})
    if x is not None:
        content["arrays"] = arrays(x)
    return [Message(content, node, "train", group_id="g") for node in nodes]


def arrays(x: Row) -> ArrayRecord:
    return ArrayRecord({"x": ArrayRecord([np.array(x, np.float32)])["0"]})


def vector(message: Message) -> Row:
    assert message.content["arrays"]["steps"].numpy() == 3
    found = message.content["arrays"]["x"].numpy()
    assert found.dtype == np.float32
    return [float(v) for v in found]


def asked(grid: SimGrid, *nodes: int, x: Row | None = None) -> list[Row]:
    return [vector(reply) for reply in grid.send_and_receive(told(*nodes, x=x))]


def lying(attack: Any, *ids: int) -> Byzantine:
    return Byzantine(ids=torch.tensor(ids), attack=attack, seed=0)


def test_the_change_of_a_reply_is_compressed_and_counted() -> None:
    """Top-1 of (5, -7, 2) on top of what was sent; a float32 and an index of two bits, beside all that is no number."""
    grid, rows = grid_of(answering(lambda node, asked: [5, -7, 2]), 1, uplink=TopK(k=1))
    (reply,) = grid.send_and_receive(told(1, x=[10, 10, 10]))
    grid.close()
    assert vector(reply) == [10, 3, 10]
    for array in reply.content["arrays"].values():
        if array.shape == (3,):
            array.data = b""
    assert rows[0]["bits_up"] == 8 * len(pack(reply.content)) + 32 + 2
    assert rows[0]["bits_down"] == 8 * len(pack(told(1, x=[10, 10, 10])[0].content))


def test_what_error_feedback_leaves_out_of_a_node_s_message_is_in_its_next() -> None:
    """Each sends (3, 2, 1): first 3 goes and (0, 2, 1) stays; then of (3, 4, 2) 4 goes; then 6 of (6, 2, 3)."""
    grid, _ = grid_of(answering(lambda node, asked: [3, 2, 1]), 2, uplink=TopK(k=1), error_feedback=True)
    assert asked(grid, 1) == [[3, 0, 0]]
    assert asked(grid, 1, 2) == [[0, 4, 0], [3, 0, 0]]
    assert asked(grid, 1, 2) == [[6, 0, 0], [0, 4, 0]]


def test_a_reply_that_never_arrives_leaves_its_error_where_it_was() -> None:
    """Every message of node 1 dies whose key says so; the others go on from the last that arrived."""
    absence = Absence(dropout=Dropout(probability=0.5))
    grid, _ = grid_of(answering(lambda node, asked: [2, 1]), 1, absence, uplink=TopK(k=1), error_feedback=True)
    came, error, died = list[Row](), np.zeros(2), 0
    for _ in range(12):
        (reply,) = grid.send_and_receive(told(1))
        if reply.has_error():
            died += 1
            continue
        u = error + [2, 1]
        sent = np.where(np.abs(u) == np.abs(u).max(), u, 0)
        if np.count_nonzero(sent) == 2:
            sent[1] = 0  # a tie goes to the first
        error = u - sent
        came.append(vector(reply))
        assert came[-1] == sent.tolist()
    assert 0 < died < 12


def test_the_change_of_what_is_sent_down_is_compressed_and_a_node_that_missed_some_gets_them() -> None:
    """(1, 1, 1) goes whole, 96 bits; then of the change (4, 3, 0) 4 goes, 34 bits; a new node gets the copy whole."""
    grid, rows = grid_of(answering(lambda node, asked: [0, 0, 0]), 2, downlink=TopK(k=1))
    assert asked(grid, 1, x=[1, 1, 1]) == [[1, 1, 1]]
    assert asked(grid, 1, x=[5, 4, 1]) == [[5, 1, 1]]
    assert asked(grid, 1, 2, x=[5, 4, 1]) == [[5, 4, 1]] * 2
    grid.close()
    empty = told(1, x=[0, 0, 0])[0].content
    empty["arrays"]["x"].data = b""
    assert rows[0]["bits_down"] == 4 * 8 * len(pack(empty)) + 96 + 34 + 34 + 96


def test_random_compressors_draw_by_client_and_message_alone() -> None:
    values = {node: [float(v) for v in range(node, node + 8)] for node in (1, 2, 3)}
    both = [grid_of(answering(lambda node, asked: values[node]), 3, uplink=RandK(k=2))[0] for _ in range(2)]
    together = asked(both[0], 1, 2, 3)
    assert [asked(both[1], node)[0] for node in (1, 2, 3)] == together
    assert all(np.count_nonzero(row) == 2 for row in together)
    assert asked(both[0], 1) != together[:1]


def test_a_compressor_for_matrices_gets_the_shapes_of_the_arrays() -> None:
    """A matrix of rank one passes a rank-one factorisation as it is."""
    app, matrix = ClientApp(), np.outer([1, 2, 3], [4, 5]).astype(np.float64)

    @app.train()
    def _(message: Message, context: Context) -> Message:
        return Message(RecordDict({"a": ArrayRecord([matrix])}), reply_to=message)

    grid, _ = grid_of(app, 1, uplink=PowerSGD(rank=1))
    (reply,) = grid.send_and_receive(told(1))
    found = reply.content["a"]["0"].numpy()
    assert found.dtype == np.float64 and np.allclose(found, matrix, rtol=1e-5)


def test_an_attack_sees_the_honest_changes_of_its_push() -> None:
    """Nodes 1 to 3 move by (n, 0); the flipped mean of those asked with it is what node 4 moves by."""
    grid, _ = grid_of(answering(lambda node, asked: [node, 0]), 4, byzantine=lying(SignFlip(), 3))
    assert asked(grid, 1, 2, 3, 4, x=[10, 10]) == [[11, 10], [12, 10], [13, 10], [8, 10]]
    assert asked(grid, 1, 4, x=[10, 10]) == [[11, 10], [9, 10]]
    assert asked(grid, 4, x=[10, 10]) == [[6, 10]]  # alone it flips what it would honestly have sent
    assert asked(grid, 1, 2, x=[10, 10]) == [[11, 10], [12, 10]]


def test_attacks_are_those_of_our_own_runs() -> None:
    grid, _ = grid_of(answering(lambda node, asked: [node**2, -node]), 6, byzantine=lying(Alie(), 4, 5))
    found = asked(grid, *range(1, 7))
    honest = torch.tensor([[float(n**2), -float(n)] for n in range(1, 5)])
    byzantine = lying(Alie(), 4, 5)
    _, fields = byzantine.deliver(torch.arange(6), {"x": torch.cat([honest, torch.zeros(2, 2)])}, 1)
    assert found == fields["x"].tolist()
    infinite, _ = grid_of(answering(lambda node, asked: [node, 0]), 2, byzantine=lying(Infinity(), 0))
    assert not np.isfinite(asked(infinite, 1, 2)[0]).any()


def test_a_silent_client_is_a_node_that_is_gone_and_sends_no_bits() -> None:
    grid, rows = grid_of(answering(lambda node, asked: [node, 0]), 2, byzantine=lying(Silence(), 0))
    replies = {m.metadata.src_node_id: m for m in grid.send_and_receive(told(1, 2))}
    grid.close()
    assert replies[1].error.code == UNAVAILABLE and vector(replies[2]) == [2, 0]
    assert rows[0]["bits_up"] == 8 * len(pack(replies[2].content)) and rows[0]["num_dropped"] == 1


def test_what_links_and_attacks_cannot_be_applied_to_is_one_message() -> None:
    grid, _ = grid_of(answering(lambda node, asked: [0]), 2, downlink=TopK(k=1))
    with pytest.raises(ConfigError, match=r"^downlink.compressor: .*different arrays at once; leave it out"):
        grid.push_messages([*told(1, x=[1]), *told(2, x=[2])])
    app = ClientApp()

    @app.train()
    def _(message: Message, context: Context) -> Message:
        found = {"a": ArrayRecord([np.arange(2)]), "b": ArrayRecord([np.ones(2)])}
        names = str(message.content["c"]["names"]).split()
        return Message(RecordDict({name: found[name] for name in names}), reply_to=message)

    def asking(names: str) -> Message:
        return Message(RecordDict({"c": ConfigRecord({"names": names})}), 1, "train")

    up, _ = grid_of(app, 2, uplink=TopK(k=1))
    lies, _ = grid_of(app, 2, byzantine=lying(SignFlip(), 0))
    for grid, key in ((up, "uplink.compressor"), (lies, "clients.byzantine.attack")):
        with pytest.raises(ConfigError, match=rf"^{key}: .*2 ArrayRecords \(a, b\)"):
            grid.push_messages([asking("a b")])
        with pytest.raises(ConfigError, match=rf"^{key}: .*'a' holds no array of floats \(int64\)"):
            grid.push_messages([asking("a")])
    assert not next(iter(up.send_and_receive([asking("")]))).has_error()  # nothing to compress
    with pytest.raises(ConfigError, match="client 0 replied no arrays to a train message"):
        lies.push_messages([asking("")])


LOSSY = (
    "uplink={compressor: {name: rand_k, k: 1}, error_feedback: true}",
    "downlink={compressor: {name: qsgd, levels: 4}}",
    "clients.byzantine={count: 1, attack: alie}",
    "clients.dropout.probability=0.2",
    "run_config.num-server-rounds=3",
)


@pytest.mark.parametrize("app", [MESSAGE, NUMPY], ids=["Message API", "NumPyClient"])
def test_a_run_with_lossy_links_and_liars_resumes_to_the_same_rows(app: Path, tmp_path: Path) -> None:
    whole = played(app, tmp_path / "whole", *LOSSY)
    assert whole != played(app, tmp_path / "plain", *LOSSY[-2:])
    broken_off(app, tmp_path / "run", 15, *LOSSY)
    assert played(app, tmp_path / "run", *LOSSY, "--resume") == whole
    assert played(app, tmp_path / "again", "--config", str(tmp_path / "whole" / "config.yaml")) == whole


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("clients.byzantine={count: 1, attack: label_flip}", "clients.byzantine.attack: poisons data"),
        ("clients.byzantine={count: 1, attack: dissensus}", "clients.byzantine.attack: dissensus tells each peer"),
        ("clients.byzantine={count: 1, attack: {name: foe, tau: optimised}}", "give a number"),
        ("clients.byzantine={count: 3}", "must leave at least one honest client of 3"),
        ("uplink.error_feedback=true", "uplink.error_feedback: needs an uplink.compressor"),
        ("uplink.compressor=top_k", "uplink.compressor"),
    ],
)
def test_mistakes_are_one_message(key: str, words: str, tmp_path: Path) -> None:
    found = fedsim("flower", "run", MESSAGE, "--out", tmp_path / "run", "clients.count=3", key)
    assert found.code == 2 and words in found.err and "Traceback" not in found.err, found.err
    assert not (tmp_path / "run").exists()
