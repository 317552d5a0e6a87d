"""The precision of matrix products: fp32, tf32 or bf16 products over fp32 storage; and that a GPU gives the same twice.

tf32 and fp32 are process-wide settings of torch, so they are entered and left in pairs and counted: the first user
sets them and the last one restores what it found. bf16 is autocast's, which belongs to a thread.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("fp32", "tf32", "bf16")

_lock = threading.Lock()
_users = 0
_before: tuple[str, bool] = ("highest", False)


def products(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A context, to be entered as often as wanted, in which products on the device have this precision."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    if precision == "fp32" and device.type == "cpu":
        return nullcontext()  # what a CPU does anyway
    return _Float32Products("high" if precision == "tf32" else "highest")


def check_precision(precision: str) -> None:
    """Refuse an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def same_bits_again(device: torch.device) -> None:
    """Have this process, if it computes on a GPU, add up in one and the same order; called before it computes.

    By itself a GPU scatters and adds by whichever thread comes first, and may choose such a way for convolutions. What
    has no other way says so, in a warning of torch's.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class _Float32Products:
    """A context that may be entered again and again, by several threads at once."""

    def __init__(self, level: str) -> None:
        self.level = level

    def __enter__(self) -> None:
        global _users, _before
        with _lock:
            if _users == 0:
                _before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
                torch.set_float32_matmul_precision(self.level)
                torch.backends.cudnn.allow_tf32 = self.level == "high"
            _users += 1

    def __exit__(self, *raised: object) -> None:
        global _users
        with _lock:
            _users -= 1
            if _users == 0:
                torch.set_float32_matmul_precision(_before[0])
                torch.backends.cudnn.allow_tf32 = _before[1]
