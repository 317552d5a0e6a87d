"""Streams of the pretend GPU, and a detector of races between them.

    with pretend_gpu(), pretend_streams():
        x, other = torch.zeros(3, device="cuda"), torch.cuda.Stream()
        with torch.cuda.stream(other):
            x + 1                       # Race: nothing makes `other` wait for the zeros

A stream's operations run in their order; between two streams nothing holds but what events say, and an operation runs
after what its host had waited for. That is kept in vector clocks: a time of a stream is a number of its operations, and
what has surely run before the next operation of a stream is a time of every other one. A memory block knows the last
write to it and the reads since. Reads must come after the write, a write after both, or a `Race` is raised where it
happens, whatever the numbers were.

A block goes back to the stream that it was taken on. So when it is let go, what other streams did with it must have
been waited for by that stream, or been announced by `record_stream`. Page-locked memory may not change until its copy
has been waited for. Such races have no operation to raise in; they are raised at the end of the context.

Of what hosts tell each other, as by a future, nothing is known here: only a host that waits for an event, a stream or
the device does it for all of them. A copy to the device that the host waited for is there for all, too.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests import device
from tests.device import FREE, GPU, Pretend

Times = dict[int, int]  # {stream: how many of its operations}


class Race(RuntimeError):
    """Two operations on one block of memory of which one writes, and neither is surely before the other."""


@dataclass
class Use:
    """An operation on a block: when on its stream, and where in the code."""

    time: int
    where: str


@dataclass
class Block:
    """What happened to a block of memory."""

    watch: Watch
    stream: int | None  # that it was taken on; None if that was before anybody watched
    write: tuple[int, Use] | None = None
    reads: dict[int, Use] = field(default_factory=dict)
    announced: set[int] = field(default_factory=set)

    def __del__(self) -> None:
        self.watch.let_go(self)


class Watch:
    """The clocks of all streams and hosts (threads)."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.done: defaultdict[int, Times] = defaultdict(dict)  # {stream: what is before its next operation}
        self.seen: defaultdict[int, Times] = defaultdict(dict)  # {host: what it waited for}
        self.seen_by_all: Times = {}
        self.events: list[Times] = [{}]  # by number; 0 is none
        self.sent: list[tuple[Tensor, Tensor, int, Use]] = []  # page-locked memory under way, and what was in it
        self.races: list[str] = []
        self.open = True

    # Events ------------------------------------------------------------------------------------------------------

    def record(self, stream: int) -> int:
        """A new event after all that a stream has to do."""
        with self.lock:
            self.events.append(dict(self._before(stream)))
            return len(self.events) - 1

    def block(self, event: int, stream: int) -> None:
        """Let a stream wait for an event."""
        with self.lock:
            _join(self.done[stream], self.events[event])

    def wait(self, times: Times, *, tell: bool) -> None:
        """Let this thread's host wait, and tell the others."""
        with self.lock:
            _join(self.seen_by_all if tell else self.seen[threading.get_ident()], times)
            self._check_sent()

    def _before(self, stream: int) -> Times:
        """What is before the next operation of a stream that this thread starts."""
        done = self.done[stream]
        _join(done, self.seen_by_all)
        _join(done, self.seen[threading.get_ident()])
        return done

    # What happens on the device ----------------------------------------------------------------------------------

    def ran(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation that was done."""
        if func.is_view:
            return
        free = func._overloadpacket.__name__ in FREE
        written: list[int] = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                written += [id(t) for t in tree_leaves(value)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Pretend)]
        reads = [] if free else [t for t in given if id(t) not in written]
        writes = [] if free else [t for t in given if id(t) in written]
        self.used(reads, writes, [t for t in tree_leaves(out) if isinstance(t, Pretend)], free)

    def used(self, reads: list[Tensor], writes: list[Tensor], made: list[Tensor], free: bool = False) -> None:
        """An operation of this thread's current stream; what is made is written too, unless that is free."""
        stream = _library().stream_here()
        with self.lock:
            before = self._before(stream)
            use = Use(before.get(stream, 0) + 1, ":".join(map(str, device._caller())))
            fresh = [t for t in made if "block" not in t.untyped_storage().__dict__]
            for t in fresh:
                t.untyped_storage().block = Block(self, stream)  # type: ignore[attr-defined]
            if free:
                return
            for t in reads:
                self._access(self._of(t), stream, before, use, writes=False)
            for t in (*writes, *fresh):
                self._access(self._of(t), stream, before, use, writes=True)
            before[stream] = use.time

    def _of(self, t: Tensor) -> Block:
        found: Block = t.untyped_storage().__dict__.setdefault("block", Block(self, None))
        return found

    def _access(self, block: Block, stream: int, before: Times, use: Use, writes: bool) -> None:
        others = [] if block.write is None else [block.write]
        others += block.reads.items() if writes else []
        for other, earlier in others:
            if other != stream and before.get(other, 0) < earlier.time:
                self._found(f"stream {stream} at {use.where} does not wait for stream {other} at {earlier.where}")
        if writes:
            block.write, block.reads = (stream, use), {}
        else:
            block.reads[stream] = use

    def _found(self, race: str) -> None:
        self.races.append(race)
        raise Race(race)

    # Between host and device -------------------------------------------------------------------------------------

    def waited(self, written: Tensor | None = None) -> None:
        """The host waited until this thread's stream was done, after a copy to the device if any."""
        self.wait(self.done[_library().stream_here()], tell=False)
        if written is not None:
            self._of(written).write = None

    def sends(self, source: Tensor) -> None:
        """A copy of page-locked memory that nobody waits for was the last operation."""
        stream = _library().stream_here()
        use = Use(self.done[stream].get(stream, 0), ":".join(map(str, device._caller())))
        self.sent.append((source, source.clone(), stream, use))

    def _check_sent(self) -> None:
        """What was sent and has arrived must have been left alone until now."""
        known, under_way = {**self.seen_by_all}, []
        _join(known, self.seen[threading.get_ident()])
        for source, before, stream, use in self.sent:
            if not torch.equal(source, before):
                self.races.append(f"page-locked memory changed before its copy was done: {use.where}")
            elif known.get(stream, 0) < use.time:
                under_way.append((source, before, stream, use))
        self.sent = under_way

    def let_go(self, block: Block) -> None:
        """Nobody holds a block any more."""
        if not self.open or block.stream is None:
            return
        with self.lock:
            known = dict(self._before(block.stream))
            for stream in block.announced:
                _join(known, self.done[stream])
            for stream, use in [*block.reads.items(), *([] if block.write is None else [block.write])]:
                if stream != block.stream and known.get(stream, 0) < use.time:
                    self.races.append(
                        f"memory of stream {block.stream} is let go while stream {stream} uses it: {use.where}"
                    )

    def close(self) -> None:
        """Look for races that nobody was told of."""
        self._check_sent()
        self.open = False
        if self.races:
            raise Race("; ".join(dict.fromkeys(self.races)))


def _join(times: Times, others: Times) -> None:
    for stream, time in others.items():
        times[stream] = max(times.get(stream, 0), time)


def _library() -> ctypes.CDLL:
    library = device._guard
    library.stream_here.restype = ctypes.c_int64
    return library


_watch = Watch()
_numbers = count(1)  # of all contexts, since a stream may be kept from one to the next; 0 is the default stream


class Stream:
    """`torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
        self.number = next(_numbers) if number is None else number
        self.device = GPU

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        _watch.block(event.number, self.number)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.number = 0

    def record(self, stream: Stream | None = None) -> None:
        self.number = _watch.record((stream or _current()).number)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _current()).wait_event(self)

    def synchronize(self) -> None:
        device._counts.add("waits")
        _watch.wait(_watch.events[self.number], tell=True)


def _current(device: Any = None) -> Stream:
    return Stream(number=_library().stream_here())


def _set(stream: Stream) -> None:
    _library().take_stream(ctypes.c_int64(stream.number))


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    before = _current()
    _set(stream)
    try:
        yield
    finally:
        _set(before)


def _synchronize(device: Any = None) -> None:
    for number in list(_watch.done):
        Stream(number=number).synchronize()


def _record_stream(tensor: Tensor, stream: Stream) -> None:
    _watch._of(tensor).announced.add(stream.number)


@contextmanager
def pretend_streams() -> Iterator[Watch]:
    """Streams, inside of `pretend_gpu`.

    Raises:
        Race: at the end, for the first races that there was no operation to raise in.
    """
    global _watch
    outside, _watch = _watch, Watch()
    record: Callable[[int], int] = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_watch.record)
    block = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(_watch.block)
    cuda = {"Stream": Stream, "Event": Event, "current_stream": _current, "set_stream": _set, "stream": _stream}
    cuda |= {"default_stream": lambda device=None: Stream(number=0), "synchronize": _synchronize}
    fakes = [
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(Pretend, "record_stream", _record_stream),
        mock.patch.object(device, "_watch", _watch),
    ]
    _library().watch_events(record, block)
    try:
        with ExitStack() as stack:
            for fake in fakes:
                stack.enter_context(fake)
            yield _watch
        _watch.close()
    finally:
        _watch.open = False
        _library().watch_events(None, None)
        _watch = outside
