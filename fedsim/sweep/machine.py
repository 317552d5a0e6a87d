"""Where the trials of a sweep run, and what their files must say so that this changes none of their bits.

A run's bits depend on the number of stacks, which `runtime.stacks: auto` takes from the workers of the run. A trial has
a single worker; so the number that it would have had as a run of its own is found here, and pinned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsim import results, runs
from fedsim.compose import compose
from fedsim.compose.sections import Runtime
from fedsim.config import ConfigError, decode, naming
from fedsim.sweep.plan import Sweep
from fedsim.sweep.space import Choice, Range
from fedsim.sweep.trials import Job, Trial
from fedsim.sweep.workers import Here, Processes, Workers


@dataclass(frozen=True)
class Machine:
    """Where trials run.

    Args:
        jobs: trials at a time; 0 for as many as a cluster has room for.
        threads: of each.
        gpus: how many there are for them.
        address: of a Ray cluster, None for this machine.
        folder: of the sweep.
    """

    jobs: int
    threads: int
    gpus: int
    address: str | None
    folder: Path

    @classmethod
    def of(cls, sweep: Sweep) -> Machine:
        """By what the command line and the section `runtime` say.

        Raises:
            ConfigError: if they contradict each other, or the section says what can't be.
        """
        fixed = {k: v for k, v in sweep.space.common.items() if not isinstance(v, Choice | Range)}
        raw, source = runs.load(sweep.config, fixed)
        with naming(source):
            runtime: Runtime = decode(Runtime, raw.get("runtime") or {}, "runtime")()
        ray = runtime.executor in ("ray", "torchrun") or runtime.address is not None
        several = sweep.jobs not in ("auto", 1) or sweep.address is not None
        if ray and several:
            raise ConfigError(
                f"{source}: runtime: asks for workers of its own for every run, and --jobs and --address give every "
                "trial one; use --jobs 1, or leave executor and address out"
            )
        gpus = torch.cuda.device_count() if runtime.device in ("auto", "cuda") else 0
        cores = max(1, len(os.sched_getaffinity(0)) // runtime.threads)
        own = runtime.device.startswith("cuda:")  # all on the one that it names
        auto = 0 if sweep.address is not None else 1 if ray or own else gpus or cores
        return cls(auto if sweep.jobs == "auto" else sweep.jobs, runtime.threads, gpus, sweep.address, sweep.folder)

    @property
    def apart(self) -> bool:
        """Whether trials run in other processes, each with one worker."""
        return self.address is not None or self.jobs > 1

    def workers(self) -> Workers:
        """What runs the trials."""
        if self.address is not None:
            from fedsim.sweep.cluster import Cluster

            return Cluster(
                self.address, jobs=self.jobs or None, threads=self.threads, gpus=min(self.gpus, 1), folder=self.folder
            )
        return Processes(self.jobs, self.gpus) if self.apart else Here()

    def check(self, trial: Trial) -> dict[str, Any]:
        """Build a trial's run without running it; its `runtime` as a worker process needs it.

        Raises:
            ConfigError: for a mistake.
        """
        raw = results.as_it_began(trial.raw, trial.folder)
        runtime = {**_runtime(raw), "executor": "in_process", "address": None}
        if self.gpus > 1 and runtime.get("workers", "auto") == "auto":
            runtime["workers"] = self.gpus  # as many actors as a run of its own would have here
        composition = compose({**trial.raw, "runtime": runtime}, trial.source)
        composition.close()
        return {**runtime, "workers": 1, "stacks": composition.resolved["runtime"]["stacks"]}

    def job(self, trial: Trial) -> Job:
        """The trial as its worker is to run it.

        Raises:
            ConfigError: for a mistake.
        """
        runtime = self.check(trial)
        raw = {**trial.raw, "runtime": runtime} if self.apart else trial.raw
        return Job(raw, trial.source, trial.folder)


def _runtime(raw: Mapping[str, Any]) -> dict[str, Any]:
    section = raw.get("runtime")
    return dict(section) if isinstance(section, Mapping) else {}
