"""Words left out of sentences of several lengths: a Hugging Face data set, an encoder with padding masks that gives a
dictionary, and targets of -100 wherever nothing was left out."""

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim
from fedsim.data import Dataset, from_table

LENGTH, WORDS, MASK = 10, 12, 12


def sentences(seed: int = 0) -> Dataset:
    """Every word is one more than that before it, so its neighbours say what was left out."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(360):
        length, first = rng.integers(5, LENGTH + 1), rng.integers(WORDS)
        ids = np.full(LENGTH, MASK + 1)
        ids[:length] = (first + np.arange(length)) % WORDS
        hidden = (np.arange(LENGTH) < length) & (np.arange(LENGTH) == rng.integers(1, length))
        rows.append(
            {
                "input_ids": np.where(hidden, MASK, ids),
                "attention_mask": (np.arange(LENGTH) < length).astype(int),
                "labels": np.where(hidden, ids, -100),
                "writer": f"writer {first % 6}",
            }
        )
    return from_table(datasets.Dataset.from_list(rows), "labels", client="writer", num_classes=MASK + 2)


class Encoder(nn.Module):
    """One head of attention, written out."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(num_classes, width), nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        h = self.words(input_ids) + self.places
        q, k, v = self.qkv(h).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        h = self.norm(h + self.out(scores.softmax(-1) @ v))
        return {"last_hidden_state": h, "logits": self.head(F.gelu(h))}


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 12,
            "task": {"name": "language_model", "dataset": f"{__name__}:sentences", "model": f"{__name__}:Encoder"},
            "partition": "natural",
            "strategy": "fedavg",
            "evaluate": {"every": 12},
            "local": {"epochs": 2, "batch_size": 12, "optimizer": {"name": "adam", "lr": 0.02}},
        }
    )
