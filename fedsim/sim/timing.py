"""How long jobs take in virtual time, from what they cost: the booking of a job before anybody computes it.

Letters: N clients, R jobs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.compress.packet import FLOAT_BITS
from fedsim.fleet import Cost, Times
from fedsim.sim.absence import Absence, Ends
from fedsim.sim.devices import Devices, law
from fedsim.streams import Streams


class Timing:
    """What a fleet knows of its clients' clocks.

    Args:
        devices: durations of jobs.
        absence: who is off line when, and which jobs die.
        num_examples: [N] samples of each client.
        model_size: P, for the cost of replies whose size is not given.
        reply_bits: bits of one model-sized vector on the way up.
        seed: of the run.
    """

    def __init__(
        self, devices: Devices, absence: Absence, num_examples: Tensor, model_size: int, reply_bits: int, seed: int
    ) -> None:
        self.devices, self.absence = devices, absence
        self._num_examples, self._model_size, self._reply_bits, self._seed = num_examples, model_size, reply_bits, seed
        self._durations: dict[int, tuple[tuple[float, float, float], Tensor]] = {}

    def ends(self, ids: Tensor, numbers: Tensor, now: float, cost: Cost, down: Tensor, second: bool = False) -> Ends:
        """How jobs, or their second halves, end that are sent now and download so many bits [R]."""
        steps = cost.steps_of(self._num_examples[ids])
        up = torch.full_like(steps, self.up(cost))
        finish = now + self._seconds(ids, numbers, steps, down.double(), up)
        if not self.absence.kills or not len(ids):
            return Ends(finish, torch.full_like(ids, -1))
        streams = Streams(self._seed, ids, numbers)
        upload = now + self.devices.seconds(streams, steps, down.double(), torch.zeros_like(up))
        return self.absence.ends(ids, numbers, now, finish, upload, up, second)

    def times(self, cost: Cost, samples: int, down: Tensor) -> Times:
        """How long jobs take that download so many bits [N]; what must be drawn is, with keys that no real job has."""
        steps, clients = cost.steps_of(self._num_examples), torch.arange(len(down))
        work, jobs = (steps, down.double(), torch.full_like(steps, self.up(cost))), torch.full_like(clients, -1)
        if (known := law(self.devices, Streams(self._seed, clients, jobs), *work)) is not None:
            return Times(*known)
        streams = [Streams(self._seed, clients, jobs - k) for k in range(samples)]
        drawn = torch.stack([self.devices.seconds(each, *work) for each in streams], dim=1)
        return Times(drawn.mean(1), torch.zeros(len(drawn), dtype=torch.float64), drawn)

    def up(self, cost: Cost) -> int:
        """Bits of a reply."""
        if cost.bits_up is not None:
            return cost.bits_up
        exact = min(cost.exact_up, cost.vectors_up)
        whole = exact * self._model_size + cost.scalars_up
        return (cost.vectors_up - exact) * self._reply_bits + whole * FLOAT_BITS

    def _seconds(self, ids: Tensor, numbers: Tensor, steps: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """[R] durations of jobs; those of clients that are sent work one by one are looked up where they never vary."""
        if self.devices.random or len(ids) > 1:
            return self.devices.seconds(Streams(self._seed, ids, numbers), steps, down, up)
        if not len(ids):
            return steps
        client, work = int(ids), (float(steps), float(down), float(up))
        known = self._durations.get(client)
        if known is None or known[0] != work:
            known = work, self.devices.seconds(Streams(self._seed, ids, numbers), steps, down, up)
            self._durations[client] = known
        return known[1]


def least(times: Times, which: Tensor) -> float:
    """Seconds that the fastest known job of some clients [N] bool takes; 0 where there are none."""
    known = (times.least if times.drawn is None else times.drawn)[which]
    return float(known.min()) if len(known) else 0.0
