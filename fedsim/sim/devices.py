"""Devices: how long a job takes. Every model returns seconds for a stack of jobs, keyed by (seed, client, job).

duration = download bits / downlink + steps * seconds_per_step + upload bits / uplink

Letters: R jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Protocol

from torch import Tensor

from fedsim.streams import Streams


class Devices(Protocol):
    """A table of these maps names to classes; a new one is a class and a row."""

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        """[R] float64 durations of jobs that take `steps` local steps and carry so many bits."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Every client is equally fast.

    Args:
        seconds_per_step: seconds of one local step.
        downlink, uplink: bits per second; infinite by default.
    """

    seconds_per_step: float = 0.01
    downlink: float = inf
    uplink: float = inf

    def __post_init__(self) -> None:
        _check_speeds(self.seconds_per_step, self.downlink, self.uplink)

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        return bits_down / self.downlink + steps * self.seconds_per_step + bits_up / self.uplink


def _check_speeds(seconds_per_step: float, downlink: float, uplink: float) -> None:
    if not seconds_per_step >= 0:
        raise ValueError(f"clients.devices.seconds_per_step must be 0 or more seconds, got {seconds_per_step}")
    for name, value in (("downlink", downlink), ("uplink", uplink)):
        if not value > 0:
            raise ValueError(f"clients.devices.{name} must be positive bits per second, got {value}")


DEVICES: dict[str, type] = {"constant": Constant}
