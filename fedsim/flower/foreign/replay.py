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
from pathlib import Path
from typing import BinaryIO

from fedsim.config import ConfigError
from fedsim.flower.foreign.nodes import Answer, Job, NodeRunner


class Replay:
    """Answers that are looked up in a file while it has them, and computed and added to it from then on.

    Args:
        path: of the file; made if need be.
        compute: who answers what is not there.
    """

    def __init__(self, path: Path, compute: NodeRunner) -> None:
        self._path, self._compute = path, compute
        path.touch()
        self._file: BinaryIO = path.open("r+b")
        self._count, self._replays = 0, True

    def answer(self, job: Job) -> Answer:
        """The answer to the next message.

        Raises:
            ConfigError: if it is another message than the file's, or the file can't be written.
        """
        self._count += 1
        key = hashlib.sha256(self._compute.key(job)).hexdigest()
        found = self._read() if self._replays else None
        if found is None:
            answer = self._compute.answer(job)
            self._write(key, answer)
            return answer
        known, answer = found
        if known != key:
            raise ConfigError(
                f"{self._path}: message {self._count}, to client {job.node - 1}, is not the one that the app sent "
                "before; a resume needs the same app, settings and seed, and an app that draws from seeded generators "
                "alone; start anew in another --out"
            )
        return answer

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _read(self) -> tuple[str, Answer] | None:
        """The next frame's key and answer; None where there is no whole one, from where on the file is written anew."""
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
