"""Sequences of several lengths, packed for a GRU: which of two words came more often?"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fedsim

LENGTH = 9


def sentences(seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(words and lengths, answers, speakers); what stands behind the end is noise that nobody may read."""
    rng = np.random.default_rng(seed)
    words, length = rng.integers(2, size=(500, LENGTH)), 2 * rng.integers(1, 5, size=500) + 1
    ones = (words * (np.arange(LENGTH) < length[:, None])).sum(1)
    return {"words": words, "length": length}, (ones > length / 2).astype(int), rng.integers(10, size=500)


class Reader(nn.Module):
    def __init__(self, num_classes: int, width: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(2, 4)
        self.gru = nn.GRU(4, width, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, words: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(words), length.cpu(), batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed)
        return self.head(last[0])


def main() -> fedsim.History:
    torch.manual_seed(0)
    return fedsim.run(
        {
            "rounds": 3,
            "local": {"epochs": 2, "batch_size": 20, "optimizer": {"name": "adam", "lr": 0.05}},
            "evaluate": {"every": 3},
        },
        model=Reader(2),
        data=sentences(),
        strategy="fedavg",
    )
