"""The seam to client halves: what they are handed, and what they hand back.

Every stack gets a broadcast of its own, so that whatever its client half does to it, the server's model stays as it is;
a half that writes to what it was handed is refused all the same, because it would compute on something else than it
was sent. What comes back is checked before anybody computes with it, and copied where somebody else holds its storage.

Letters: R jobs, C clients of a stack, P entries of a client's vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsim.compress.packet import Packet
from fedsim.fleet import Exact
from fedsim.memory import MemoryRows
from fedsim.terms import Terms


class Lent:
    """What one stack was handed: to be read, and neither written to nor kept.

    Args:
        received: {name: value} of the broadcast and of the inbox.
        memory: rows of the clients.
        pool: the worker's scratch buffers.
    """

    def __init__(self, received: Mapping[str, Any], memory: MemoryRows, pool: Mapping[str, Tensor]) -> None:
        self._tensors = {name: value for name, value in received.items() if isinstance(value, Tensor)}
        self._versions = {name: value._version for name, value in self._tensors.items()}
        self._memory, self._pool = memory, pool
        self._taken: list[tuple[int, int]] | None = None

    def check_unwritten(self) -> None:
        """Refuse a client half that wrote to what it was handed.

        Raises:
            ValueError: if it did.
        """
        for name, tensor in self._tensors.items():
            if tensor._version != self._versions[name]:
                raise ValueError(
                    f"it wrote to the {name} that it received, in place; let it write to a copy (y = {name}.clone())"
                )
        self._memory.check_unwritten()

    def owned(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values, with tensors that are nobody else's; vectors made of terms will be new ones in any case."""

        def made(value: Any) -> Any:
            if isinstance(value, Packet):
                return replace(value, payload=self.owned(value.payload))
            return self.own(value) if isinstance(value, Tensor) else value

        return {name: made(value) for name, value in values.items()}

    def own(self, value: Tensor) -> Tensor:
        """The tensor itself if nobody else holds its storage, else a copy; from now on it counts as somebody's."""
        value = value.detach()
        if self._taken is None:
            self._taken = [
                _span(t) for t in (*self._tensors.values(), *self._memory.handed_out(), *self._pool.values())
            ]
        start, stop = _span(value)
        taken = any(start < end and begin < stop for begin, end in self._taken)
        repeats = any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True))
        # a storage that torch cannot resize is NumPy's, and whoever made it may still write there
        if taken or repeats or not value.untyped_storage().resizable():
            value = value.clone(memory_format=torch.contiguous_format)
        self._taken.append(_span(value))
        return value


def _span(value: Tensor) -> tuple[int, int]:
    """Where the bytes of a tensor's storage begin and end."""
    storage = value.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def check_reply(reply: Any, num_clients: int) -> None:
    """Refuse a reply that is not {field: a number, or one row for each client of the stack}.

    Args:
        reply: of a client half.
        num_clients: C.

    Raises:
        ValueError: naming the field, what it is, and what it needs to be.
    """
    if not isinstance(reply, Mapping):
        raise ValueError(f"it returned a {type(reply).__name__}; return {{name: tensor}}, or {{}} for nothing")
    for name, value in reply.items():
        if not isinstance(name, str):
            raise ValueError(f"the field {name!r} of its reply is named by a {type(name).__name__}; name it by text")
        value = value.value if isinstance(value, Exact) else value
        if not isinstance(value, Tensor | Terms | Packet):
            raise ValueError(
                f"field {name!r} of its reply is a {type(value).__name__}; return a tensor, terms, or a packet"
            )
        for shape in _shapes(value):
            if shape[0] != num_clients or (isinstance(value, Terms) and len(shape) == 1):
                raise ValueError(
                    f"field {name!r} of its reply has the shape {shape} and needs one row for each of the "
                    f"{num_clients} clients of the stack, [{num_clients}, ...]"
                )
        if isinstance(value, Tensor) and value.ndim > 1 and not value.dtype.is_floating_point:
            raise ValueError(f"field {name!r} of its reply holds vectors of {value.dtype}; they need a floating dtype")


def _shapes(value: Tensor | Terms | Packet) -> list[list[int]]:
    """Shapes that must begin with C; none for a number."""
    if isinstance(value, Tensor):
        return [list(value.shape)] if value.ndim else []
    if isinstance(value, Packet):
        return [[len(value), value.num_entries]]
    tensors = [list(term.shape) for _, term in value.terms if isinstance(term, Tensor)]
    others = [[len(term), -1] for _, term in value.terms if not isinstance(term, Tensor)]
    return others + [shape for shape in tensors if len(shape) > 1] or tensors
