"""Answers kept in a file, so that a run which broke off is played again without computing what it had.

An app's server can't be stopped in its middle and go on: its code is in no state that could be saved. But what a node
answers is a function of what it is told, so the same server under the same seed, given the same answers, comes to the
same point. Each answer is kept with a digest of all that it depends on, the app's code aside; a server that sends
another message than before is refused. A frame of the file is a digest, a line of JSON and the bytes that it measures;
one that was cut short by a kill, and what follows it, is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from fedsim.config import ConfigError
from fedsim.flower.foreign.nodes import Answer, Answering, Job


class Replay:
    """Answers that are looked up in a file while it has them, and computed and added to it from then on.

    Args:
        path: of the file; made if need be.
        compute: who answers what is not there.
        settings: of the run, all that answers depend on beside their messages.
    """

    def __init__(self, path: Path, compute: Answering, settings: tuple[object, ...]) -> None:
        self._path, self._compute, self._settings = path, compute, settings
        path.touch()
        self._file: BinaryIO = path.open("r+b")
        self._count, self._replays = 0, True

    def answers(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """The answers to the next messages.

        Raises:
            ConfigError: if one is another message than the file's, or the file can't be written.
        """
        keys, done = self._keys(jobs), 0
        while done < len(jobs) and (found := self._read()) is not None:
            self._count += 1
            if found[0] != keys[done]:
                raise ConfigError(
                    f"{self._path}: message {self._count}, to client {jobs[done].node - 1}, is not the one that the "
                    "app sent before; a resume needs the same app, settings and seed, and an app that draws from "
                    "seeded generators alone; start anew in another --out"
                )
            yield found[1]
            done += 1
        for key, answer in zip(keys[done:], self._compute(jobs[done:]), strict=True):
            self._write(key, answer)
            yield answer

    def _keys(self, jobs: Sequence[Job]) -> list[str]:
        """Digests of all that answers depend on, the app's code aside."""
        digests: dict[bytes, bytes] = {}  # most messages of a push have the same content
        keys = []
        for job in jobs:
            if job.content not in digests:
                digests[job.content] = hashlib.sha256(job.content).digest()
            said = (self._settings, job.node, job.number, job.message_id, job.message_type, job.group_id, job.ttl)
            parts = repr(said).encode(), digests[job.content], hashlib.sha256(job.state).digest()
            keys.append(hashlib.sha256(b"".join(parts)).hexdigest())
        return keys

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _read(self) -> tuple[str, Answer] | None:
        """The next frame's key and answer; None where there is no whole one, from where on the file is written anew."""
        if not self._replays:
            return None
        start = self._file.tell()
        try:
            digest, _, head = self._file.readline().partition(b" ")
            frame = json.loads(head)
            body = self._file.read(frame["content"] + frame["state"])
            if _digest(head, body) != digest:
                raise ValueError("damaged")
        except (ValueError, KeyError, TypeError, OverflowError):
            self._replays = False
            self._file.seek(start)
            self._file.truncate()
            return None
        content = body[: frame["content"]] if frame["code"] is None else None
        return frame["key"], Answer(content, body[frame["content"] :], frame["code"] or 0, frame["reason"])

    def _write(self, key: str, answer: Answer) -> None:
        content = answer.content or b""
        code, body = answer.code if answer.content is None else None, content + answer.state
        frame = {
            "key": key,
            "content": len(content),
            "state": len(answer.state),
            "code": code,
            "reason": answer.reason,
        }
        head = json.dumps(frame).encode() + b"\n"
        try:
            self._file.write(_digest(head, body) + b" " + head + body)
            self._file.flush()
        except OSError as e:
            raise ConfigError(f"{self._path}: can't write: {e}; make room and add --resume, or set keep=false") from e


def _digest(head: bytes, body: bytes) -> bytes:
    return hashlib.sha256(head + body).hexdigest().encode()
