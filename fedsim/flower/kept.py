"""What a device keeps between two messages: the rows that its client half remembers, and its copies of broadcasts.

Nothing but this lasts from one message to the next. It lies in Flower's `Context.state`, which ends with the run and
with the SuperNode; or, where the node has a folder for it, in a file of the run there, from which a node or a run that
is started again goes on. Memory is kept by version, which counts how often it was written. The server says which
version a job begins with, so that it may have missed a reply, or have gone back to its last checkpoint.

Letters: P entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flwr.app import ArrayRecord, Context
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedsim.config import ConfigError
from fedsim.files import write_tensors
from fedsim.flower import wire
from fedsim.flower.downlink import Numbered
from fedsim.flower.wire import Head

MEMORY, COPIES = "fedsim.memory", "fedsim.copies"
FOLDER = "fedsim-memory"  # the node's setting


class Kept:
    """See the module's head; changes last once they are saved.

    Args:
        context: of the app; its node config may name the folder.
        run: the number of the run.

    Raises:
        ConfigError: if the node's file cannot be read.
    """

    def __init__(self, context: Context, run: int) -> None:
        self._state = context.state
        folder = context.node_config.get(FOLDER)
        name = f"client-{context.node_config.get('partition-id')}-of-{run:016x}.safetensors"
        self._path = None if not folder else Path(str(folder)) / name
        self._rows = self._from_state() if self._path is None else _from_file(self._path)

    def memory(self, version: int) -> dict[str, Tensor]:
        """What the client half remembered when it had written so often; nothing before it did.

        Raises:
            ValueError: if it is not here.
        """
        if version and _of(version) not in self._rows:
            known = sorted(int(kind.rpartition("/")[2]) for kind in self._rows if kind != COPIES)
            raise ValueError(
                f"the server knows that it wrote its memory {version} times, and here is what it was after "
                f"{', '.join(map(str, known)) or 0}: its memory is gone, for the node or the run was started anew; "
                f"start nodes with {FOLDER}=FOLDER to keep it"
            )
        return self._rows.get(_of(version), {})

    def copies(self) -> dict[str, Numbered]:
        """{name: the copy} of broadcasts that come as changes."""
        known = {tuple(key.split("/", 1)): value for key, value in self._rows.get(COPIES, {}).items()}
        return {name: (int(number), value) for (number, name), value in known.items()}

    def remember(self, head: Head, rows: Mapping[str, Tensor]) -> int:
        """Keep what a job wrote, and of older versions those that the server may ask for; the new version."""
        new = self.memory(head.version) | dict(rows)
        wanted = {COPIES, _of(head.saved), _of(head.version)}
        self._rows = {kind: v for kind, v in self._rows.items() if kind in wanted} | {_of(head.version + 1): new}
        return head.version + 1

    def update(self, copies: Mapping[str, Numbered]) -> None:
        """Keep copies of broadcasts beside those that are kept already."""
        both = self.copies() | dict(copies)
        self._rows[COPIES] = {f"{number}/{name}": value for name, (number, value) in both.items()}

    def save(self) -> None:
        """Make what is kept last.

        Raises:
            OSError: if the file cannot be written.
        """
        rows = {kind: values for kind, values in self._rows.items() if values}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # copies, since versions share what no job wrote in between, and a file holds no tensor twice
            named = {f"{kind}:{k}": v.clone() for kind, values in rows.items() for k, v in values.items()}
            write_tensors(self._path, named)
            return
        for kind in [*self._state]:
            del self._state[kind]
        for kind, values in rows.items():
            self._state[kind] = ArrayRecord({k: wire.raw_array(v) for k, v in values.items()})

    def _from_state(self) -> dict[str, dict[str, Tensor]]:
        return {
            kind: {k: wire.of_array(a, wire.Book({})) for k, a in record.items()}  # type: ignore[misc]
            for kind, record in self._state.array_records.items()
        }


def _of(version: int) -> str:
    return f"{MEMORY}/{version}"


def _from_file(path: Path) -> dict[str, dict[str, Tensor]]:
    if not path.exists():
        return {}
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{path} cannot be read ({e}); remove it and start the run anew") from e
    rows: dict[str, dict[str, Tensor]] = {}
    for name, value in found.items():
        kind, _, key = name.partition(":")
        rows.setdefault(kind, {})[key] = value
    return rows
