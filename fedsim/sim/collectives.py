"""Workers that talk to each other by torch.distributed: broadcasts go down and sums come up without a server between.

A group lives as long as all of its workers do. Whoever finds another one gone, or slower than the group's deadline,
leaves it, which ends the connections of the rest; a new group has a new store. Tensors travel as bytes: over gloo by
way of the CPU, over NCCL from GPU to GPU. What is agreed upon, and Python objects, always travel over gloo.

Letters: W workers.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fedsim.config import ConfigError
from fedsim.sim.executor import Lost
from fedsim.sim.packing import pack, unpack
from fedsim.sim.tree import TreeSum, joins

Backend = Literal["gloo", "nccl"]
Collectives = Literal["auto", "object_store", "gloo", "nccl"]
FOREVER = timedelta(days=365)
LARGE_BYTES = 8 << 20  # of a vector: from here on workers of one machine hand it on faster in their shared memory
FEW_GROUPS = 8  # so many vectors a driver takes from there as fast as workers join them


def backend_for(collectives: Collectives, *, gpus: bool) -> Backend | None:
    """How workers talk to each other: a rule, never a timing; None for through Ray's object store.

    Raises:
        ConfigError: for NCCL without GPUs.

    >>> backend_for("auto", gpus=True), backend_for("auto", gpus=False), backend_for("object_store", gpus=True)
    ('nccl', 'gloo', None)
    """
    if collectives == "nccl" and not gpus:
        raise ConfigError(
            "runtime.collectives: nccl needs a GPU for every worker, and these compute on the CPU; use gloo or auto, "
            "or set runtime.device=cuda"
        )
    if collectives == "auto":
        return "nccl" if gpus else "gloo"
    return None if collectives == "object_store" else collectives


def least_groups(collectives: Collectives, backend: Backend, *, one_machine: bool, nbytes: int) -> int:
    """Of how many groups of stacks a call has to be for its sums to go between the workers; a rule, as above.

    Args:
        collectives: what the file says; `auto` alone may take the object store for some calls.
        backend: of the workers' groups.
        one_machine: whether all workers and the driver share their memory.
        nbytes: of the model.

    >>> [least_groups("auto", "gloo", one_machine=True, nbytes=n) for n in (4 << 20, 40 << 20)]
    [2, 9]
    >>> least_groups("auto", "gloo", one_machine=False, nbytes=40 << 20)
    2
    """
    shared = collectives == "auto" and backend == "gloo" and one_machine and nbytes >= LARGE_BYTES
    return FEW_GROUPS + 1 if shared else 2


@dataclass(frozen=True)
class Outline:
    """What a tensor looks like, for those who are about to receive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def outlined(named: Mapping[str, Any]) -> dict[str, Any]:
    """A broadcast with outlines in the place of its tensors."""
    return {k: Outline(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for k, v in named.items()}


class Group:
    """This process's membership in a group of workers; one at a time.

    Args:
        store: where the workers find each other; of this group alone.
        rank: this worker's number.
        size: W.
        host: of the store, reached by the interface that others can reach this worker at.
        backend: nccl between GPUs, gloo otherwise.
        timeout_seconds: after which a worker that does not take part counts as lost.

    Raises:
        Lost: if some worker did not come.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, *, host: str, backend: Backend, timeout_seconds: float
    ) -> None:
        self.rank, self.size = rank, size
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        if (name := interface_to(host)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a lost worker is an exception, not the process's end
        try:
            with _others():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo",
                    store=store,
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=timeout_seconds),
                )
                self._waiting = dist.new_group(backend="gloo", timeout=FOREVER)
        except Lost:
            self.close()  # or no other group could be entered
            raise

    def broadcast(
        self, outlines: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """What worker 0 holds, on every worker.

        Args:
            outlines: of it, by `outlined`.
            own: it itself on worker 0; ignored on the others.
        """
        if self.rank == 0:
            for value in (v for named in own for v in named.values() if isinstance(v, Tensor)):
                self._broadcast(value.to(self.device).contiguous())
            return [dict(named) for named in own]
        return [
            {k: self._broadcast(self._like(v)) if isinstance(v, Outline) else v for k, v in named.items()}
            for named in outlines
        ]

    def agree(self, value: Any) -> list[Any]:
        """[W] what every worker said."""
        values: list[Any] = [None] * self.size
        with _others():
            dist.all_gather_object(values, value)
        return values

    def fold(self, tree: TreeSum, bounds: Sequence[int]) -> None:
        """Join all workers' sums along the tree; its root ends at worker 0.

        Args:
            tree: this worker's sums, written to.
            bounds: [W + 1] which groups were whose; worker 0 had some, unless there were none at all.
        """
        like = next(iter(tree.nodes.values()), {})
        outline = outlined(like)
        for node, sender, receiver in joins(bounds):
            if self.rank == sender:
                sums = tree.nodes.pop(node)
                for name in sorted(sums):
                    with _others():
                        dist.send(_bytes(sums[name].to(self.device).contiguous()), receiver)
            elif self.rank == receiver:
                sums = {name: self._received(outline[name], sender).to(like[name].device) for name in sorted(like)}
                tree.add(node, sums)

    def send(self, value: Any, receiver: int) -> None:
        """An object to another worker of this run, which opens it as a pickle."""
        with _others():
            dist.send_object_list([pack(value)], receiver, group=self._waiting)

    def receive(self, sender: int) -> Any:
        """What another worker sends, however long that takes while it lives."""
        parcel: list[Any] = [None]
        with _others():
            dist.recv_object_list(parcel, sender, group=self._waiting)
        return unpack(parcel[0])

    def close(self) -> None:
        """Leave; whoever still waits for this worker finds it lost."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _like(self, outline: Outline) -> Tensor:
        return torch.empty(outline.shape, dtype=outline.dtype, device=self.device)

    def _broadcast(self, value: Tensor) -> Tensor:
        with _others():
            dist.broadcast(_bytes(value), 0)
        return value

    def _received(self, outline: Outline, sender: int) -> Tensor:
        value = self._like(outline)
        with _others():
            dist.recv(_bytes(value), sender)
        return value


def open_store(host: str) -> dist.TCPStore:
    """A store that listens at one address of this machine, at a port of its own."""
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def meet(store: dist.Store, rank: int, size: int, seconds: float) -> None:
    """Wait until all workers of a group have come.

    Raises:
        Lost: if one has not come in time.
    """
    with _others():
        store.set(f"here/{rank}", "")
    for other in range(size):
        if said(store, f"here/{other}", seconds) is None:
            raise Lost(f"worker {other} did not come within {seconds:g} s")


def said(store: dist.Store, key: str, seconds: float) -> str | None:
    """What somebody has written to a store, None if nothing in time."""
    until = time.monotonic() + seconds
    with _others():
        while not store.check([key]):  # the store's own waiting would write to stderr when it is over
            if time.monotonic() > until:
                return None
            time.sleep(0.05)
        return store.get(key).decode()


def interface_to(host: str) -> str | None:
    """The network interface over which this machine reaches a host; None if that cannot be said.

    By itself gloo listens where the machine's own name leads, which often is 127.0.0.1, out of the others' reach.
    """
    try:
        (family, kind, _, _, place), *_ = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as s:
            s.connect(place)  # sends nothing: it only asks for the route
            own = s.getsockname()[0]
    except OSError:
        return None
    owners = (name for name, held in psutil.net_if_addrs().items() if own in {address.address for address in held})
    return next(owners, None)


@contextmanager
def _others() -> Iterator[None]:
    """What torch says of a worker that is gone or late, as `Lost`."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"^\[\S+\] ", "", str(error).strip().split("\n")[0])  # gloo begins with a line of its own source
        raise Lost(text.split(". ")[0]) from error


def _bytes(value: Tensor) -> Tensor:
    """The memory of a contiguous tensor, since not every back end knows every type."""
    # as_strided rather than view: a dimension of one entry may have stride 0, which a view of bytes refuses
    return value.as_strided((value.numel(),), (1,)).view(torch.uint8)
