"""Data of a federation: one pool of samples and, for each client, which rows of it are its own.

Nothing here is kept per client as an object: a client is two neighbouring entries of `offsets`, so a million
clients cost 8 MB, and the samples of any stack of clients are gathered in one indexing operation.

Letters: N clients in all, C in a stack, B positions per client, n samples in the pool, m entries of `order`,
T length of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fedsim.data.checks import check_fraction
from fedsim.data.dataset import LabelledRows
from fedsim.streams import Streams
from fedsim.trees import Tree, each, one, pick

_ENTRIES = 1 << 22  # of the clients' orders that are looked at together


@dataclass(frozen=True, kw_only=True)
class FederatedData(LabelledRows):
    """Samples and their owners.

    Args:
        offsets: [N+1] int64; client i owns the rows `order[offsets[i]:offsets[i+1]]`.
        order: [m] int64 rows of the pool. A row may belong to several clients, or to none.
        client_names: one per client, where the data has names for them.
        test_owners: [n_test] int64, the client that holds out each held-out row, -1 for the server alone; None if
            clients hold out nothing.
    """

    offsets: Tensor
    order: Tensor
    client_names: tuple[str, ...] | None = None
    test_owners: Tensor | None = None

    @property
    def num_clients(self) -> int:
        """N."""
        return self.offsets.numel() - 1

    @property
    def num_examples(self) -> Tensor:
        """[N] int64: samples of each client."""
        return self.offsets.diff()

    def rows(self, ids: Tensor, position: Tensor) -> Tensor:
        """[C, B] int64 rows of the pool that stand at positions [C, B] of clients ids [C], counted from 0.

        Positions beyond a client's last sample give its last one; a client without samples gives some valid row, which
        the caller weights zero.
        """
        start, end = self.offsets[ids, None], self.offsets[ids + 1, None]
        at = torch.minimum(start + position.clamp(min=0), end - 1)
        return self.order[at.clamp(0, self.order.numel() - 1)]

    def class_counts(self) -> Tensor:
        """[N, num_classes] int64: targets of each class that clients have; a sequence counts once per element."""
        owner = torch.repeat_interleave(torch.arange(self.num_clients, device=self.order.device), self.num_examples)
        assert isinstance(self.targets, Tensor)
        labels = self.targets[self.order]
        cell = owner.view(-1, *[1] * (labels.ndim - 1)) * self.num_classes + labels
        counts = torch.bincount(cell.flatten(), minlength=self.num_clients * self.num_classes)
        return counts.view(self.num_clients, self.num_classes)

    def to(self, device: torch.device | str) -> FederatedData:
        """The same data with its tensors on a device."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device)

        return replace(
            self,
            inputs=each(moved, self.inputs),
            targets=each(moved, self.targets),
            offsets=moved(self.offsets),
            order=moved(self.order),
            test_inputs=each(moved, self.test_inputs),
            test_targets=each(moved, self.test_targets),
        )

    def check(self, origin: str = "data") -> Self:
        """See `LabelledRows.check`; a partition may not name rows that do not exist, nor give nobody any."""
        super().check(origin)
        offsets, order, n = self.offsets, self.order, len(self)
        if offsets.dtype != torch.int64 or order.dtype != torch.int64 or offsets.ndim != 1 or order.ndim != 1:
            raise ValueError(
                f"{origin}: offsets and order must be one-dimensional int64, got {offsets.dtype}{list(offsets.shape)} "
                f"and {order.dtype}{list(order.shape)}"
            )
        if self.num_clients < 1:
            raise ValueError(f"{origin}: the federation has no clients; set clients.count to 1 or more")
        if offsets[0] != 0 or offsets[-1] != order.numel() or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"{origin}: offsets must start at 0, never fall and end at the {order.numel()} entries of order; they "
                f"run from {int(offsets[0])} to {int(offsets[-1])}"
            )
        if not order.numel():
            raise ValueError(f"{origin}: the partition is empty, none of the {self.num_clients} clients has a sample")
        if order.min() < 0 or order.max() >= n:
            raise ValueError(
                f"{origin}: the partition names rows {int(order.min())} to {int(order.max())}, but the rows are "
                f"0 to {n - 1}"
            )
        if self.client_names is not None and len(self.client_names) != self.num_clients:
            raise ValueError(f"{origin}: {len(self.client_names)} client names for {self.num_clients} clients")
        if (held := self.test_owners) is not None:
            num_held = len(one(self.test_targets))
            if held.dtype != torch.int64 or held.shape != (num_held,):
                raise ValueError(f"{origin}: test_owners must be int64 with one entry for each of {num_held} rows")
            if num_held and (held.min() < -1 or held.max() >= self.num_clients):
                raise ValueError(f"{origin}: test_owners must be clients 0 to {self.num_clients - 1}, or -1")
        return self


def given_out(data: FederatedData) -> FederatedData:
    """What clients hold out where the data says it (`test_owners`): these rows, with the same clients."""
    assert data.test_owners is not None
    order = torch.argsort(data.test_owners, stable=True)
    order = order[data.test_owners[order] >= 0]
    counts = torch.bincount(data.test_owners[order], minlength=data.num_clients)
    return _only(data, data.test_inputs, data.test_targets, order, counts)


def held_out(data: FederatedData, share: float, seed: int) -> tuple[FederatedData, FederatedData]:
    """Hold out a share of every client's samples.

    Which ones follows from the seed, the client's id and how many it has, wherever its data lie.

    Args:
        data: of the federation.
        share: in [0, 1); a client gives up round(share * its samples), and keeps one at least.
        seed: of the run.

    Returns:
        (what is left to train on, what was held out), with the same clients.

    Raises:
        ValueError: for another share.
    """
    check_fraction("client_test", share)
    counts, start = data.num_examples, data.offsets[:-1]
    held = (share * counts.double()).round().long().minimum(counts - 1).clamp(min=0)
    chosen = torch.zeros(len(data.order), dtype=torch.bool)
    for ids in torch.arange(len(counts)).split(max(1, _ENTRIES // max(int(counts.max()), 1))):
        order = Streams(seed, ids, torch.zeros_like(ids)).permutation("client_test", counts[ids])
        taken = torch.arange(order.shape[1]) < held[ids, None]
        chosen[(start[ids, None] + order)[taken]] = True
    rows = data.order[chosen]
    left = replace(data, order=data.order[~chosen], offsets=_ends(counts - held))
    return left, _only(data, data.inputs, data.targets, rows, held)


def _only(data: FederatedData, inputs: Tree, targets: Tree, rows: Tensor, counts: Tensor) -> FederatedData:
    """Data with these rows of a pool, in the order of the clients, who have so many each."""
    return replace(
        data,
        inputs=pick(inputs, rows),
        targets=pick(targets, rows),
        order=torch.arange(len(rows)),
        offsets=_ends(counts),
    )


def _ends(counts: Tensor) -> Tensor:
    """Offsets [N+1] of so many entries [N] each."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
