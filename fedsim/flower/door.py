"""The door: what a device says is looked at here before anybody computes with it.

A device may run anything. What it says passes if a device of this experiment could have said it: a reply to the job
that it was given, with one row a field, as many vectors of the model's size as the job's cost says, finite numbers,
packets no longer than the model or what it was sent, metrics under names that are free, and the fields that most
devices' replies to the same work have. All else is refused with its reason, which costs the reply and not the run.

Letters: P entries of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from reprlib import repr as brief
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.compress.packet import LIMIT, Packet
from fedsim.flower import wire
from fedsim.metrics import check_names
from fedsim.sim.account import bits_of
from fedsim.sim.events import Sent
from fedsim.sim.executor import Results
from fedsim.sim.links import step_of
from fedsim.sim.seam import check_reply

MAX_EXAMPLES = 10_000_000  # a count weighs a device's replies, so that it may not be any number
RECORDS: dict[str, type] = {
    wire.HEAD: ConfigRecord,
    wire.TENSORS: ArrayRecord,
    wire.NUMBERS: ConfigRecord,
    wire.NOTHING: ConfigRecord,
    wire.LOGGED: MetricRecord,
}
"""What a reply holds."""

Form = tuple[Any, ...]
"""What of a question or of its answer is no tensor's entry: names, shapes, types, and numbers that were sent."""


class Refused(ValueError):
    """No device of this experiment could have said this."""


class NotFinite(Refused):
    """Only a device whose model diverged could have said this."""


@dataclass(frozen=True)
class Opened:
    """A reply that passed: how often its device has written its memory by now, what it gave, and of what form it is."""

    version: int
    results: Results
    form: Form


@dataclass(frozen=True, kw_only=True)
class Door:
    """See the module's head.

    Args:
        book: names of compressors.
        seed: of the run.
        model_size: P, of a vector that travels.
        max_examples: samples that a device may say it has.
        agreed: {what: as which} that a device must have as the server has it: versions, the model, parts of the file.
    """

    book: wire.Book
    seed: int
    model_size: int
    max_examples: int = MAX_EXAMPLES
    agreed: Mapping[str, str] = field(default_factory=dict)

    def about(self, content: RecordDict, num_clients: int) -> tuple[int, int]:
        """(which client a node says it is, how many samples it says it has).

        Raises:
            Refused: if it does not say so, or there is no such client, or it has more samples than a device may, or
                something else than the server.
        """
        said = content.get(wire.ABOUT)
        if not isinstance(said, ConfigRecord) or set(said) != {"client", "num_examples", *self.agreed}:
            raise Refused(
                f"it says {brief(dict(content))}, and not which client it is, how many samples it has and what else is "
                "agreed upon: its fedsim is another"
            )
        client, count = said["client"], said["num_examples"]
        if type(client) is not int or not 0 <= client < num_clients:
            raise Refused(f"it says it is client {brief(client)}, and clients are 0..{num_clients - 1}")
        if type(count) is not int or not 0 <= count <= self.max_examples:
            raise Refused(
                f"it says it is client {client} and has {brief(count)} samples; a device has 0..{self.max_examples}, "
                "or set fedsim-max-examples"
            )
        for what, known in self.agreed.items():
            if said[what] != known:
                raise Refused(
                    f"client {client} has another {what} than the server ({brief(said[what])}, and not {known!r}); "
                    "both ends need the same"
                )
        return client, count

    def reply(self, content: RecordDict, head: wire.Head, sent: Sent, vectors: int, num_examples: int) -> Opened:
        """What a reply to a job holds, on the CPU.

        Args:
            content: of the message.
            head: of the job.
            sent: with it.
            vectors: of the model's size that it must hold at least.
            num_examples: samples of the client; without any, numbers may be NaN.

        Raises:
            Refused: if it is none to this job.
        """
        try:
            version = _check_head(content, head)
            values = self._values(content, head, sent)
            logged = _logged(content, bool(num_examples))
            fields = {k: v.decode() if isinstance(v, Packet) else v for k, v in values.items()}
            for name, value in fields.items():
                _check_finite(name, value, may_lack=not num_examples and value.numel() == 1)
            found = sum(v.ndim > 1 and v.numel() == self.model_size for v in fields.values())
            if found < vectors:
                raise Refused(
                    f"it holds {found} vectors of {self.model_size} entries, and its job's cost says {vectors}"
                )
        except Refused:
            raise
        except ValueError as e:  # a ConfigError too
            raise Refused(str(e)) from e
        bits = torch.tensor([sum(map(bits_of, values.values()))])
        return Opened(version, Results(fields, {}, {}, logged, bits), (*_form(fields), *sorted(logged)))

    def scores(self, content: RecordDict, head: wire.Head, sent: Sent) -> dict[str, Tensor]:
        """{name: [1]} of an answer beside the rounds: scores, and `examples`, the samples that they are means of.

        Raises:
            Refused: if it is something else.
        """
        try:
            _check_head(content, head)
            values = self._values(content, head, sent)
            scores = {k: v.double() for k, v in values.items() if isinstance(v, Tensor) and v.shape == (1,)}
            examples = float(scores.get("examples", -1))
            if len(scores) < len(values) or not 0 <= examples <= self.max_examples:
                raise Refused("scores are one number each, and one of them, examples, says of how many samples")
            for name, value in scores.items():
                _check_finite(name, value, may_lack=not (name.endswith("loss") and examples))
        except ValueError as e:
            raise Refused(str(e)) from e
        return scores

    def _values(self, content: RecordDict, head: wire.Head, sent: Sent) -> dict[str, Tensor | Packet]:
        """The fields of a reply: tensors of one row, and packets no longer than the model or what was sent."""
        if content[wire.NUMBERS] or dict(content[wire.NOTHING]) != {"names": []}:
            raise Refused("it holds numbers or nothing under a name, and a reply is tensors and packets alone")
        longest = max([self.model_size, *(v.numel() for v in sent.broadcast.values() if isinstance(v, Tensor))])
        steps = (0, *map(step_of, content[wire.TENSORS]))
        keys = {(self.seed, head.client, head.number, step) for step in steps}
        values = wire.read(content, self.book, longest, keys)
        check_reply(values, 1)
        return values


@dataclass
class Forms:
    """Which form most devices' replies to a question have; where two are as frequent, the one that came first.

    Args:
        seen: {question: {form: clients whose replies had it}}, of the questions that were asked last.
    """

    seen: dict[Form, dict[Form, set[int]]] = field(default_factory=dict)

    def note(self, question: Form, form: Form, client: int) -> None:
        self.seen.setdefault(question, {}).setdefault(form, set()).add(client)
        while len(self.seen) > 64:
            del self.seen[next(iter(self.seen))]

    def usual(self, question: Form, form: Form) -> bool:
        """Whether a reply to a question has the form that most have."""
        forms = self.seen.get(question, {form: set()})
        return form == max(forms, key=lambda other: len(forms[other]))


def question(sent: Sent) -> Form:
    """What was asked, but for the entries of tensors."""
    return (sent.work, *_form(sent.broadcast))


def _form(values: Mapping[str, Any]) -> Form:
    said = {k: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for k, v in values.items()}
    return tuple(sorted(said.items(), key=lambda item: item[0]))


def _check_head(content: RecordDict, head: wire.Head) -> int:
    """Refuse a message that is no reply to the job with this head; how often its device has written its memory."""
    found = {name: type(record) for name, record in content.items()}
    if found != RECORDS:
        raise Refused(f"it holds {brief(sorted(found))}, and a reply holds {', '.join(RECORDS)}")
    said = wire.Head.read(content)
    if (said.client, said.number, said.work, said.round) != (head.client, head.number, head.work, head.round):
        raise Refused(
            f"job {head.number} of client {head.client} ({head.work}) was answered by job {brief(said.number)} of "
            f"client {brief(said.client)} ({brief(said.work)})"
        )
    if said.version - head.version not in (0, 1):
        raise Refused(
            f"it says it wrote its memory {brief(said.version)} times, and had written it {head.version} times before"
        )
    return said.version


def _logged(content: RecordDict, has_data: bool) -> dict[str, Tensor]:
    """{metric: [1]} that a device logged."""
    logged = dict(content[wire.LOGGED])
    check_names(logged, "a device")
    for name, value in logged.items():
        if not isinstance(value, int | float) or (has_data and not isfinite(value)):
            kind = NotFinite if isinstance(value, float) else Refused
            raise kind(f"metric {brief(name)} is {brief(value)}, and no finite number")
    return {k: torch.tensor([float(v)], dtype=torch.float64) for k, v in logged.items()}


def _check_finite(name: str, value: Tensor, may_lack: bool) -> None:
    """Refuse what is not finite, or as good as that; a number may be lacking (NaN) where that has a meaning."""
    if value.is_floating_point() and value.numel():
        low, high = (float(v) for v in torch.aminmax(value))
        if not (-LIMIT <= low and high <= LIMIT) and not (may_lack and low != low):
            raise NotFinite(f"field {brief(name)} is not finite: it holds {low:g} to {high:g}")
