"""The nodes of a Flower app: what a client does with a message, as a pure function of bytes.

Node ids are 1 to N, and node i + 1 has partition-id i. What a node is told, what it answers and what it keeps
(`Context.state`) are records as Flower serialises them, so that nothing is shared that a network would not share.

The global generators of Python, numpy and torch are seeded for each message, and put back after it, so that what a
client draws depends on (seed, client, message) alone. They are one for a process: so it has one client at a time.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.flower.foreign.private import RAISED, RUN_ID, number, pack, unpack
from fedsim.streams import server_rng


@dataclass(frozen=True)
class Job:
    """A message for a node.

    Args:
        node: its id.
        number: how many messages it had before.
        message_id, message_type, group_id, ttl: of the message; ttl in seconds.
        content: the record.
        state: what the node keeps.
    """

    node: int
    number: int
    message_id: str
    message_type: str
    group_id: str
    ttl: float
    content: bytes
    state: bytes


@dataclass(frozen=True)
class Answer:
    """What a node answers.

    Args:
        content: the reply's record; None for an error.
        state: what the node keeps from now on; as before if its app raised.
        code, reason: of an error.
    """

    content: bytes | None
    state: bytes
    code: int = 0
    reason: str = ""


Answering = Callable[[Sequence[Job]], Iterable[Answer]]
"""What nodes answer, in the order of their messages, no two of which are for one node."""


@dataclass(frozen=True)
class NodeRunner:
    """Runs any node of an app in this process, which has its generators to itself meanwhile.

    Args:
        app: every node's.
        count: N.
        run_config: the app's settings.
        seed: of the run.
    """

    app: ClientApp
    count: int
    run_config: Mapping[str, Any]
    seed: int

    def answers(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """What the nodes answer, one after the other; the generators are put back when all are done."""
        with generators_put_back():
            for job in jobs:
                yield self.answer(job)

    def answer(self, job: Job) -> Answer:
        """Let the app handle a message; what it raises becomes an error with its traceback."""
        message = Message(unpack(job.content), job.node, job.message_type, ttl=job.ttl, group_id=job.group_id)
        config = {"partition-id": job.node - 1, "num-partitions": self.count}
        context = Context(RUN_ID, job.node, config, unpack(job.state), dict(self.run_config))
        try:
            seed_generators(self.seed, f"flower client {job.node}", job.number)
            reply = self.app(number(message, job.message_id), context)
            if reply.has_error():
                return Answer(None, job.state, reply.error.code, reply.error.reason)
            return Answer(pack(reply.content), pack(context.state))
        except (Exception, SystemExit):  # an app may call sys.exit, which ends its process and not the federation's
            return Answer(None, job.state, RAISED, traceback.format_exc())


NOTHING_KEPT = pack(RecordDict())


@contextmanager
def seeded(seed: int, purpose: str, step: int = 0) -> Iterator[None]:
    """The global generators of Python, numpy and torch, seeded by a key inside and put back after it."""
    with generators_put_back():
        seed_generators(seed, purpose, step)
        yield


@contextmanager
def generators_put_back() -> Iterator[None]:
    """The global generators of Python, numpy and torch are after it as they were before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def seed_generators(seed: int, purpose: str, step: int = 0) -> None:
    """Seed the global generators of Python, numpy and torch by a key."""
    words = server_rng(seed, purpose, step).integers(2**32, size=3, dtype=np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed takes milliseconds where there is no GPU
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(int(words[2]))
