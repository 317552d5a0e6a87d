"""What the section `task` describes: a task that computes its own field, or data and a module for an engine.

An entry is called with its own fields and, where it has such parameters, with `seed`, `count` (of clients: a number
in any case), `clients` (that section), `device`, `root` and `client_test` (both of `data`), and `partition` (the entry
of that section, which otherwise may not stand in the file).
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fedsim.compose.games import Adversarial, Gan
from fedsim.compose.sections import Clients, File, Runtime
from fedsim.compose.supervised import (
    NUM_CLIENTS,
    Classification,
    LanguageModel,
    Multilabel,
    OnSamples,
    Regression,
    Samples,
    Supervised,
)
from fedsim.compose.work import Work
from fedsim.config import ConfigError, FromTable, at
from fedsim.engine import Plan, build_engine, choose_engine
from fedsim.engine.choose import graphed
from fedsim.prox import Prox
from fedsim.task import Task
from fedsim.tasks.bilinear import BilinearTask
from fedsim.tasks.own import check_task
from fedsim.tasks.quadratic import Numbers, QuadraticTask
from fedsim.tasks.robust import RobustLogisticTask
from fedsim.trees import pick, tensors

DATA_SHARE = 0.25  # of a card, for samples; stacks take half, rows of clients a quarter


def plan_of(problem: Task | Samples, work: Work, runtime: Runtime, device: torch.device) -> Plan:
    """Engine and stack width, by the rule or as the file sets them; a formula has no engine and wide stacks."""
    if isinstance(problem, Task):
        width = max(1, min(1024, len(problem.num_examples))) if runtime.stack == "auto" else runtime.stack
        return Plan("exact", width, "the task computes its own field")
    plan = choose_engine(
        problem.module,
        problem.layout,
        device=device,
        batch_size=work.batch_size,
        steps=int(work.steps.max()),
        num_clients=work.cohort_size,
        engine=runtime.engine,
        stack=runtime.stack,
        native=runtime.native,
        precision=runtime.precision,
        plain=work.in_factors,
        loss=problem.loss,
        sample=pick(problem.data.inputs, 0),
    )
    return replace(plan, graphs=graphed(plan.engine, device, runtime.graphs), data=_place(problem, runtime, device))


def _place(problem: Samples, runtime: Runtime, device: torch.device) -> Literal["device", "host"]:
    """Where the samples lie; `auto` takes a GPU for a quarter of it at most."""
    if device.type == "cpu":
        return "host"
    if runtime.data != "auto":
        return runtime.data
    sets = [data for data in (problem.data, problem.held) if data is not None]
    parts = [part for data in sets for part in (data.inputs, data.targets, data.test_inputs, data.test_targets)]
    needed = sum(t.nbytes for part in parts for t in tensors(part).values())
    return "device" if needed <= DATA_SHARE * torch.cuda.get_device_properties(device).total_memory else "host"


def task_of(problem: Task | Samples, plan: Plan, precision: str, device: torch.device) -> Task:
    """The task, computed as planned."""
    if isinstance(problem, Task):
        return problem
    made = problem.module, problem.layout, problem.loss, device, precision
    engine = build_engine(plan.engine, *made, native=plan.native, graphs=plan.graphs)
    data, held, metrics = problem.data, problem.held, problem.metrics
    if plan.data == "device":
        data, held = data.to(device), None if held is None else held.to(device)
    return problem.task(data, problem.module, problem.x0, engine, problem.loss, held, metrics, problem.prox, device)


def quadratic(
    *,
    seed: int,
    clients: Clients,
    device: torch.device,
    a: Numbers | None = None,
    b: Numbers | None = None,
    x0: float | tuple[float, ...] | None = None,
    dim: int = 10,
    spread: float = 1.0,
    noise: float = 0.0,
) -> Task:
    """Clients f_i(x) = 1/2 (x - b_i)' A_i (x - b_i) with a known solution; given, or drawn with `dim` and `spread`.

    Args:
        a: A_i, one entry a client: a number, a diagonal [d] or a matrix [d, d].
        b: b_i, one entry a client: a number or [d].
        x0: where training starts: [d], or a number for every entry; 0 by default.
        dim: d of clients that are drawn, with diagonals in [0.5, 2].
        spread: standard deviation of the entries of drawn b_i.
        noise: standard deviation of what is added to every entry of every local gradient.
    """
    if (a is None) != (b is None):
        raise ValueError("give both a and b, one entry per client, or neither to have them drawn")
    if a is None:
        task = QuadraticTask.drawn(clients.count or NUM_CLIENTS, dim, seed, spread=spread, noise=noise)
        if x0 is not None:
            task.x0 = _start(x0, dim)
    else:
        a_all, b_all = _numbers("a", a), _numbers("b", b)
        if clients.count not in (None, len(b_all)):
            raise ValueError(f"b has {len(b_all)} entries but clients.count is {clients.count}; leave one of them out")
        start = _start(0.0 if x0 is None else x0, 1 if b_all.ndim == 1 else b_all.shape[1])
        task = QuadraticTask(a_all, b_all, start, noise)
    return task.to(device)


def _numbers(name: str, value: Any) -> Tensor:
    try:
        found = torch.tensor(value, dtype=torch.float32)
    except ValueError as e:
        raise ValueError(f"{name}: {e}; give every client an entry of the same shape") from e
    if not found.ndim:
        raise ValueError(f"{name}: give one entry per client, such as [1, 3], got {value!r}")
    return found


def _start(x0: float | tuple[float, ...], dim: int) -> Tensor:
    value = torch.tensor(x0, dtype=torch.float32)
    return value.expand(dim).clone() if value.ndim == 0 else value


def bilinear(
    *,
    seed: int,
    clients: Clients,
    device: torch.device,
    dim: int = 50,
    low: float = 0.5,
    high: float = 2.0,
    lam: float = 0.0,
    noise: float = 0.0,
    prox: Annotated[Prox | None, FromTable("prox")] = None,
) -> Task:
    """Saddle points x'A_m y + ... with a known solution; `dim` numbers each in x and y, spectrum [low, high].

    Args:
        dim: entries of x, and of y.
        low, high: least and greatest singular value of every A_m.
        lam: strong monotonicity, lambda; 0 is purely bilinear.
        noise: standard deviation of what is added to every entry of the operator.
        prox: of x and of y, each by itself: a set to stay in, or a penalty.
    """
    if dim < 1 or not 0 < low <= high or lam < 0 or noise < 0:
        raise ValueError(
            f"needs dim >= 1, 0 < low <= high, lam >= 0, noise >= 0; got {dim}, {low}, {high}, {lam}, {noise}"
        )
    made = BilinearTask.drawn(clients.count or 25, dim, seed, low=low, high=high, lam=lam, noise=noise, prox=prox)
    return made.to(device)


def robust_logistic(
    *,
    seed: int,
    clients: Clients,
    device: torch.device,
    dim: int = 10,
    samples: int = 50,
    epsilon: float | None = 0.5,
    rho: float = 2.0,
    lam: float = 0.1,
    spread: float = 1.0,
) -> Task:
    """Logistic regression against a perturbation |r| <= epsilon that costs rho |r|^2; drawn, with a known solution.

    Args:
        dim: features of a sample.
        samples: of each client.
        epsilon: how far the perturbation goes; null for any distance.
        rho: what its square costs.
        lam: lambda, weight of the classifier's penalty.
        spread: standard deviation of the clients' means; 0 draws all samples alike.
    """
    if dim < 1 or samples < 1 or (epsilon is not None and epsilon <= 0) or rho <= 0 or lam <= 0 or spread < 0:
        raise ValueError(
            "needs dim >= 1, samples >= 1, epsilon > 0 or null, rho > 0, lam > 0, spread >= 0; got "
            f"{dim}, {samples}, {epsilon}, {rho}, {lam}, {spread}"
        )
    task = RobustLogisticTask.drawn(
        clients.count or NUM_CLIENTS, dim, samples, seed, epsilon=epsilon, rho=rho, lam=lam, spread=spread
    )
    return task.to(device)


TASKS: dict[str, Callable[..., Task | OnSamples]] = {
    "classification": Classification,
    "regression": Regression,
    "multilabel": Multilabel,
    "language_model": LanguageModel,
    "supervised": Supervised,
    "quadratic": quadratic,
    "bilinear": bilinear,
    "robust_logistic": robust_logistic,
    "adversarial": Adversarial,
    "gan": Gan,
}


def problem_of(file: File, device: torch.device) -> Task | Samples:
    """What the section `task` describes; see the module's head.

    Raises:
        ConfigError: for a task that is none, or does not fit the file.
    """
    count = file.clients.count
    target = file.task.target
    if isinstance(target, ABCMeta) and target.__abstractmethods__:
        missing = ", ".join(sorted(target.__abstractmethods__))
        raise ConfigError(f"task.name: lacks {missing}; docs/tutorial/tasks.md shows what a task needs")
    made = file.task(
        seed=file.seed,
        count=count or NUM_CLIENTS,
        clients=file.clients,
        device=device,
        root=file.data.root,
        partition=file.partition,
        client_test=file.data.client_test,
    )
    if isinstance(made, OnSamples):
        return made.samples()
    if file.data.client_test and not made.holds_out:
        raise ConfigError(
            f"data.client_test: {file.task.name} has no samples that clients could hold out; leave it out"
        )
    with at("task"):
        task = check_task(made, file.seed)
        n = len(task.num_examples)
        if count not in (None, n):
            raise ValueError(f"it has {n} clients, but clients.count is {count}; give it a parameter `count` to follow")
    return task
