"""The task that an experiment file describes: its data, its model and the engine that computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fedsim.compose.refusals import check_model
from fedsim.compose.sections import Clients, Runtime
from fedsim.config import ConfigError, FromTable, Reader
from fedsim.data import PARTITIONS
from fedsim.data import build as build_data
from fedsim.data.federated import FederatedData
from fedsim.data.partition import Natural
from fedsim.engine import Plan, build_engine, choose
from fedsim.engine.losses import LOSSES, Loss
from fedsim.params import Layout
from fedsim.task import Schedule, Task
from fedsim.tasks.bilinear import BilinearTask
from fedsim.tasks.classification import ClassificationTask
from fedsim.tasks.models import init_parameters
from fedsim.tasks.quadratic import Numbers, QuadraticTask

NUM_CLIENTS = 100  # unless the file or the data say how many there are


@dataclass(frozen=True)
class Site:
    """What a task needs to know of the rest of the file.

    Args:
        reader: of the file.
        seed: of the run.
        clients, runtime: those sections.
        device: where stacks lie.
        root: the folder to look for data in first.
        schedule: of local training.
        cohort_size: clients of a round, if the file says.
        plain: whether local steps are plain SGD, which engines can fuse.
    """

    reader: Reader
    seed: int
    clients: Clients
    runtime: Runtime
    device: torch.device
    root: str | None
    schedule: Schedule
    cohort_size: int | None
    plain: bool

    def exact(self, task: Any, reason: str) -> Problem:
        """A problem whose field is a formula, so that no engine is needed and stacks may be wide."""
        stack, n = self.runtime.stack, len(task.num_examples)
        width = stack if stack != "auto" else max(1, min(1024, n))
        return Problem(task.to(self.device), Plan("exact", width, reason))


@dataclass
class Problem:
    """What building a task gave.

    Args:
        task: the task.
        plan: engine and stack width.
        data, module: of a classification task.
    """

    task: Task
    plan: Plan
    data: FederatedData | None = None
    module: nn.Module | None = None


def classification(
    site: Site,
    *,
    dataset: Annotated[Any, FromTable("dataset", "digits")],
    model: Annotated[Any, FromTable("model", "mlp")],
    loss: str = "cross_entropy",
) -> Problem:
    """Classes or next tokens: any data set, any torch module."""
    data = _federated(site, dataset(site))
    module, x0 = init_parameters(lambda: model(data), site.seed)
    check_model(site.reader, module, data, loss)
    sample_loss = _sample_loss(site.reader, loss)
    layout = Layout.of_module(module)
    plan = _plan(site, data, module, layout, sample_loss)
    engine = build_engine(
        plan.engine, module, layout, sample_loss, site.device, site.runtime.precision, native=plan.native
    )
    task = ClassificationTask(data.to(site.device), module, x0, engine, sample_loss)
    return Problem(task, plan, data, module)


def _federated(site: Site, source: Any) -> FederatedData:
    """The data of every client, by the section `partition`."""
    partition = site.reader.entry("partition", PARTITIONS, default="iid")
    natural = isinstance(source, FederatedData) or isinstance(partition, Natural)
    count = site.clients.count if natural else site.clients.count or NUM_CLIENTS
    try:
        return build_data(source, partition, count, site.seed)
    except ConfigError:
        raise
    except ValueError as e:
        raise site.reader.error("partition", str(e)) from e


def _sample_loss(reader: Reader, loss: str) -> Loss:
    if loss in LOSSES:
        return LOSSES[loss]
    if ":" in loss:
        return reader.imported(loss, "task.loss")
    raise reader.error("task.loss", f"unknown loss {loss!r}; known: {', '.join(LOSSES)}, or pkg.module:name")


def _plan(site: Site, data: FederatedData, module: nn.Module, layout: Layout, loss: Loss) -> Plan:
    """Engine and stack width, by the rule or as the file sets them."""
    counts, runtime = data.num_examples, site.runtime
    size = site.schedule.batch_size or int(counts.max())
    return choose(
        module,
        layout,
        device=site.device,
        batch_size=min(size, int(counts.max())),
        steps=int(site.schedule.num_steps(counts).max()),
        num_clients=min(site.cohort_size or len(counts), len(counts)),
        engine=runtime.engine,
        stack=runtime.stack,
        native=runtime.native,
        precision=runtime.precision,
        plain=site.plain,
        loss=loss,
        sample=data.inputs[0],
    )


def quadratic(
    site: Site,
    *,
    a: Numbers | None = None,
    b: Numbers | None = None,
    x0: float | tuple[float, ...] | None = None,
    dim: int = 10,
    spread: float = 1.0,
    noise: float = 0.0,
) -> Problem:
    """Clients f_i(x) = 1/2 (x - b_i)' A_i (x - b_i) with a known solution; given, or drawn with `dim` and `spread`."""
    if (a is None) != (b is None):
        raise ValueError("give both a and b, one entry per client, or neither to have them drawn")
    if a is None:
        task = QuadraticTask.drawn(site.clients.count or NUM_CLIENTS, dim, site.seed, spread=spread, noise=noise)
        if x0 is not None:
            task.x0 = _start(x0, dim)
    else:
        at, bt = _numbers("a", a), _numbers("b", b)
        if site.clients.count not in (None, len(bt)):
            raise ValueError(
                f"b has {len(bt)} entries but clients.count is {site.clients.count}; leave one of them out"
            )
        task = QuadraticTask(at, bt, _start(0.0 if x0 is None else x0, 1 if bt.ndim == 1 else bt.shape[1]), noise)
    return site.exact(task, "the gradient is a formula")


def _numbers(name: str, value: Any) -> Tensor:
    try:
        return torch.tensor(value, dtype=torch.float32)
    except ValueError as e:
        raise ValueError(f"{name}: {e}; give every client an entry of the same shape") from e


def _start(x0: float | tuple[float, ...], dim: int) -> Tensor:
    value = torch.tensor(x0, dtype=torch.float32)
    return value.expand(dim).clone() if value.ndim == 0 else value


def bilinear(
    site: Site, *, dim: int = 50, low: float = 0.5, high: float = 2.0, lam: float = 0.0, noise: float = 0.0
) -> Problem:
    """Saddle points x'A_m y + ... with a known solution; `dim` numbers each in x and y, spectrum [low, high]."""
    if dim < 1 or not 0 < low <= high or lam < 0 or noise < 0:
        raise ValueError(
            f"needs dim >= 1, 0 < low <= high, lam >= 0, noise >= 0; got {dim}, {low}, {high}, {lam}, {noise}"
        )
    count = site.clients.count or 25
    task = BilinearTask.drawn(count, dim, site.seed, low=low, high=high, lam=lam, noise=noise)
    return site.exact(task, "the operator is a formula")


TASKS: dict[str, Callable[..., Problem]] = {
    "classification": classification,
    "quadratic": quadratic,
    "bilinear": bilinear,
}
