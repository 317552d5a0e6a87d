"""What strategies that compress on the server's side share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.streams import Streams

SERVER = -1  # the server's place among client ids, for its compressor's random numbers


def server_streams(like: Tensor, round: int, rng: np.random.Generator) -> Streams:
    """Streams of one row for what the server compresses in a round, on the device of `like`; takes one draw of rng."""
    seed = int(rng.integers(1 << 62))
    return Streams(seed, torch.tensor([SERVER], device=like.device), torch.tensor([round], device=like.device))
