"""FedPer: the last layers stay with the client, the others are averaged.

Arivazhagan, Aggarwal, Singh, Choudhary. Federated Learning with Personalization Layers. arXiv:1912.00818, algorithms 1
and 2: base and personalisation layers are trained together, by the same steps.

Letters: Q shared entries; x those of the server's model, y a whole local model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.strategies.personal import Personal


@dataclass(frozen=True, kw_only=True)
class FedPer(Personal):
    """A personal head: entries that stay with the client, by default the last layer, are trained with the rest."""

    def usual(self) -> tuple[str, ...]:
        if not self.layout.last_layer:
            raise ValueError("personal: no last layer beside others trains here; name entries, or [] for none")
        return self.layout.last_layer

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        y = self.opened(clients, x)
        return self.closed(clients, y, self.local(clients, y).delta.dense())
