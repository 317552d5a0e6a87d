"""Replies from anybody, record by record: the door opens to what a device could have sent, or says why not."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.random import Generator, default_rng
from torch import Tensor

from fedsim.compress.sparsify import Bernoulli, RandK, TopK
from fedsim.flower import wire
from fedsim.flower.door import Door, Refused
from fedsim.metrics import EVALUATED, RESERVED
from fedsim.sim.events import Sent
from fedsim.streams import Streams
from tests.fedsim.flower.local_grid import through_bytes
from tests.fuzz.amount import cases

P, CLIENT, JOB = 8, 2, 5
BOOK = wire.Book({"uplink": TopK(k=3), "coin": Bernoulli(p=1.0), "seeded": RandK(k=3, shared_seed=True)})
DOOR = Door(book=BOOK, seed=0, model_size=P)
HEAD = wire.Head(work="update", client=CLIENT, number=JOB, round=4, version=1, saved=0, run=5)
SENT = Sent("update", {"x": torch.zeros(P), "lr": 0.1}, 4)
STREAMS = Streams(0, torch.tensor([CLIENT]), torch.tensor([JOB]))
V = torch.linspace(-1.0, 1.0, P)[None]
HONEST: list[dict[str, Tensor]] = [
    {"delta": V, "steps": torch.ones(1)},
    *({"delta": compressor.encode(V, STREAMS), "c": V} for compressor in BOOK.compressors.values()),
]
ODD = [0, -1, 1, 2, P, 10**9, 2**31, 2**53, 2**62, -(2**62), True]
WORDS = ["", "x", "update", "delta", "round", "test_loss", "train_loss", "float32", "float64", "complex64", "quint8",
         wire.RAW, "fedsim.packet/uplink", "fedsim.packet/coin", f"fedsim.packet/seeded@0,{CLIENT},{JOB},0",
         "fedsim.packet/seeded@9,9,9,9", "fedsim.packet/", "numpy.ndarray", "\0", "x" * 4000]  # fmt: skip
NUMBERS = [float("nan"), float("inf"), -1.0, 0.0, 1e300]


def written(values: dict[str, Tensor]) -> RecordDict:
    """An honest reply."""
    content = wire.write(values, BOOK, [(0, CLIENT, JOB, 0)])
    HEAD.write(content)
    content[wire.LOGGED] = MetricRecord({"train_loss": 0.5})
    return content


def scalar(rng: Generator) -> object:
    kind = rng.integers(4)
    if kind == 0:
        return ODD[rng.integers(len(ODD))]
    if kind == 1:
        return NUMBERS[rng.integers(len(NUMBERS))]
    return WORDS[rng.integers(len(WORDS))] if kind == 2 else rng.bytes(3)


def spoil(content: RecordDict, rng: Generator) -> None:
    """Change one thing in a reply."""
    key, kind = list(content)[rng.integers(len(content))], rng.integers(10)
    if kind == 0:
        del content[key]
    elif kind == 1:
        content[WORDS[1 + rng.integers(6)]] = ConfigRecord()
    elif kind == 2:
        content[key] = [ArrayRecord(), ConfigRecord({"a": 1}), MetricRecord({"train_loss": 1})][rng.integers(3)]
    elif kind == 3:
        old = content.get(wire.HEAD)
        old = old if isinstance(old, ConfigRecord) else ConfigRecord()
        content[wire.HEAD] = ConfigRecord({**old, ["more", *old][rng.integers(1 + len(old))]: scalar(rng)})
    elif kind == 4:
        record = content.get([wire.NUMBERS, wire.NOTHING][rng.integers(2)])
        if isinstance(record, ConfigRecord):
            record[["names", "delta"][rng.integers(2)]] = [scalar(rng), ["x"], [1]][rng.integers(3)]
    elif kind == 5:
        value = [ODD[rng.integers(10)], NUMBERS[rng.integers(5)], [1.0, 2.0], [1]][rng.integers(4)]
        content[wire.LOGGED] = MetricRecord({WORDS[rng.integers(7)]: value})
    elif isinstance(record := content.get(wire.TENSORS), ArrayRecord) and record:
        spoil_array(record, rng)


def spoil_array(record: ArrayRecord, rng: Generator) -> None:
    """Change one array of a record: its name, type, shape, kind or bytes."""
    name = list(record)[rng.integers(len(record))]
    old, kind = record.pop(name), rng.integers(5)
    dtype, shape, stype, data = old.dtype, old.shape, old.stype, old.data
    if kind == 0:
        name = WORDS[rng.integers(len(WORDS))]
    elif kind == 1:
        dtype = WORDS[rng.integers(len(WORDS))]
    elif kind == 2:
        shape = tuple(int(ODD[i]) for i in rng.integers(len(ODD), size=rng.integers(4)))
    elif kind == 3:
        stype = WORDS[rng.integers(len(WORDS))]
    else:
        data = [rng.bytes(len(data)), data[:-1], data + b"\0", b"\0\0\xc0\x7f" + data[4:]][rng.integers(4)]
    record[name] = Array(dtype, shape, stype, data)


@pytest.mark.timeout(3600)
def test_a_spoiled_reply_is_refused_or_could_have_been_sent() -> None:
    rng, taken, total = default_rng(17), 0, cases(600, 10_000)
    for case in range(total):
        content = written(HONEST[case % len(HONEST)])
        for _ in range(rng.integers(1, 3)):
            spoil(content, rng)
        if case % 8 == 0:
            content = through_bytes(content)
        try:
            opened = DOOR.reply(content, HEAD, SENT, vectors=1, num_examples=3)
        except Refused as e:
            assert 0 < len(str(e)) < 700
            continue
        taken += 1
        assert opened.version in (1, 2)
        fields, logged = opened.results.fields, opened.results.metrics
        assert any(tuple(v.shape) == (1, P) for v in fields.values())
        for value in fields.values():
            assert value.shape[:1] in ((), (1,)) and value.numel() <= 2 * P
            assert not value.is_floating_point() or bool((value.abs() <= 2.0**126).all())
        assert not any(k in RESERVED or k.startswith(EVALUATED) for k in logged)
        assert all(bool(v.isfinite()) for v in logged.values())
    assert 0 < taken < total / 2


def test_spoiled_words_of_a_node_about_itself_are_refused_or_a_client_and_a_count() -> None:
    rng = default_rng(3)
    for _ in range(cases(100, 2000)):
        about = {"client": 1, "num_examples": 5, "more": 0}
        about = {
            k: scalar(rng) if rng.integers(2) else v for k, v in about.items() if k != "more" or not rng.integers(9)
        }
        content = RecordDict({[wire.ABOUT, "x"][int(rng.integers(9) == 0)]: ConfigRecord(about)})
        try:
            client, count = DOOR.about(content, 3)
        except Refused as e:
            assert 0 < len(str(e)) < 700
        else:
            assert type(client) is int and 0 <= client < 3 and type(count) is int and 0 <= count <= 10**7


@pytest.mark.parametrize("reply", range(len(HONEST)))
def test_honest_replies_pass(reply: int) -> None:
    opened = DOOR.reply(through_bytes(written(HONEST[reply])), HEAD, SENT, vectors=1, num_examples=3)
    sent = HONEST[reply]["delta"]
    assert torch.equal(opened.results.fields["delta"], sent if isinstance(sent, Tensor) else sent.decode())
