"""FedBN: normalisation layers stay with the client.

Li, Jiang, Zhang, Kamp, Dou. FedBN: Federated Learning on Non-IID Features via Local Batch Normalization.
arXiv:2102.07623, algorithm 1: the parameters of normalisation layers (scale and shift) and their running statistics
are not averaged; the rest is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.strategies.fedper import FedPer


@dataclass(frozen=True, kw_only=True)
class FedBN(FedPer):
    """Normalisation layers, running statistics included, stay with the client; the rest is averaged."""

    def usual(self) -> tuple[str, ...]:
        if not self.layout.norms:
            raise ValueError("personal: this model has no normalisation layer; name entries, or take fedavg")
        return self.layout.norms
