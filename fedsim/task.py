"""What a task is: a field (gradient or operator) for every client, and how good a solution is.

Letters: N clients, C clients of a stack, P entries of a client's vector, K local steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fedsim.params import Layout
from fedsim.prox import FREE, Prox
from fedsim.streams import Streams
from fedsim.terms import Factors
from fedsim.trees import Tree


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a client goes through its own data.

    Args:
        epochs: passes over the client's data, or None when `steps` is given.
        steps: local steps, or None when `epochs` is given.
        batch_size: samples of a step; None for all of a client's data.
        shuffle: a fresh keyed order every epoch; False keeps the order of the data.
        part: (a, b, u): only what lies between a/u and b/u of the client's samples, as they stand; None for all.
    """

    epochs: int | None = 1
    steps: int | None = None
    batch_size: int | None = 20
    shuffle: bool = True
    part: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, not both and not neither")
        for name in ("epochs", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value is not None and value > 2**53:
                raise ValueError(f"{name} must be at most 2^53, got {value}")

    def span(self, num_examples: Tensor) -> tuple[Tensor, Tensor]:
        """([C] where the samples that it goes through begin, [C] how many these are) of so many that clients have.

        Parts (0, b, u) and (b, u, u) of any data are all of it.

        >>> Schedule(part=(1, 3, 4)).span(torch.tensor([8, 5, 1]))
        (tensor([2, 1, 0]), tensor([4, 2, 0]))
        """
        if self.part is None:
            return torch.zeros_like(num_examples), num_examples
        first, last, units = self.part
        start = num_examples * first // units
        return start, num_examples * last // units - start

    def num_steps(self, num_examples: Tensor) -> Tensor:
        """[C] int64 local steps of clients that go through so many samples; one without data takes none."""
        if self.steps is not None:
            return torch.where(num_examples > 0, self.steps, 0)
        assert self.epochs is not None
        return self.epochs * self.steps_per_epoch(num_examples)

    def steps_per_epoch(self, num_examples: Tensor) -> Tensor:
        """[C] int64: minibatches in one pass, the last of which may be short."""
        if self.batch_size is None:
            return (num_examples > 0).to(torch.int64)
        return (num_examples + self.batch_size - 1) // self.batch_size


Steps = TypeVar("Steps", float, Tensor)
T = TypeVar("T")


def reach(steps: Steps, pull: float) -> Steps:
    """1 + q + ... + q^(steps - 1) with q = 1 - pull: how far steps along one vector go while each takes back `pull`.

    >>> reach(3, 0.0), reach(3, 0.5)
    (3, 1.75)
    """
    return steps if not pull else (1 - (1 - pull) ** steps) / pull


@dataclass(frozen=True)
class Walk:
    """Steps y <- y - lr * (scale * g + pull * (y - x) + shift) from y = x.

    Args:
        lr: of every step.
        scale: of the gradients g.
        pull: towards x.
        shift: a sum of (weight, tensor [P] that clients share, or [C, P] of their own).
        less_start: take from each g the gradient of the same minibatch at x [P].
    """

    lr: float
    scale: float = 1.0
    pull: float = 0.0
    shift: tuple[tuple[float, Tensor], ...] = ()
    less_start: bool = False


class Batches(Protocol):
    """The minibatches of a stack, step by step; clients that take more steps come first."""

    num_steps: Tensor

    def __len__(self) -> int:
        """Steps of the busiest client."""

    def active(self, step: int) -> int:
        """How many of the first clients still take this step."""

    def __getitem__(self, step: int) -> Any:
        """The batch of the active clients, in the task's own form."""


class Session(Protocol):
    """A task, or its engine, bound to one stack x [C, P] for the steps of one local run.

    It belongs to the thread that made it; drop it, and its views of x are gone.
    """

    def gradient(self, batch: Any, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(gradient or operator [C, P], loss [C]) at the present x; batches are in the task's own form.

        The gradient is the caller's to write to; it lies in `out` [C, P] if that is given.
        """

    def sgd_step_(
        self,
        batch: Any,
        lr: float | Tensor,
        *,
        scale: float = 1.0,
        shift: Tensor | None = None,
    ) -> Tensor | None:
        """One step x <- x - lr * (scale * g + shift) in place, fused into the backward products.

        Equal to `gradient` and then the update, up to float rounding.

        Args:
            batch: of the C clients.
            lr: the learning rate; also as a tensor [].
            scale: of the gradient g.
            shift: [P] or [C, P]; its entries for buffers are ignored.

        Returns:
            loss [C] before the step, or None where steps are not fused (then nothing was touched).
        """
        return None

    def weighted_sum(self, batch: Any, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """The sum over each client's samples of their gradients, tensor by tensor times a weight.

        Args:
            batch: of the C clients; the gradient of padding is zero.
            weigh: [C, B, L] weights from the squared norms [C, B, L] of samples' gradients by each of the L trained
                tensors, in the layout's order.

        Returns:
            ([C, P], mean loss [C]), or None where single samples cannot be told apart.
        """
        return None


@dataclass(frozen=True)
class PlainSession(Session):
    """Steps that share nothing and fuse nothing: what a task without an engine offers."""

    field: Callable[[Tensor, Any], tuple[Tensor, Tensor]]
    x: Tensor

    def gradient(self, batch: Any, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        g, loss = self.field(self.x, batch)
        return (g if out is None else out.copy_(g)), loss


class Oracle(Protocol):
    """The present minibatches of k clients as functions of their points: what optimizers may need beside a gradient.

    A method is called only for a need that the task does not lack (`Task.lacks`): `losses` for `loss_eval`,
    `sampled_grad` for that, `hvp` for that, `clipped_sum` for `per_sample_norms`.

    Attributes:
        loss: [k] mean loss that the last `losses` or `clipped_sum` came across, for the record; None before.
    """

    loss: Tensor | None

    def batch_sizes(self) -> Tensor:
        """[k] samples of each client's batch, padding not counted."""

    def num_labels(self) -> Tensor:
        """[k] labels behind each client's mean loss: one a sample, or one a position of a sequence."""

    def losses(self, points: Tensor) -> Tensor:
        """[q, k] mean losses at points [q, k, n], on the same batch and without dropout."""

    def sampled_grad(self, x: Tensor) -> Tensor:
        """[k, n] gradient of the mean loss at x [k, n] with labels drawn from the model's own predictions there."""

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        """[k, n] Hessian of the mean loss at x [k, n] times v [k, n]."""

    def clipped_sum(self, x: Tensor, bounds: Tensor) -> Tensor:
        """[k, n] sum over a client's samples of g_i, clipped (`optim.needs.sample_factors`) at bounds [1] or [L]."""


@dataclass(frozen=True)
class Constants:
    """What a theory asks of a problem.

    Args:
        each: [N] float64, Lipschitz constants of the clients' fields.
        of_mean: that of their mean.
        mu: strong monotonicity of the mean.
        potential: whether fields are gradients, so that the mean is minimised.
    """

    each: Tensor
    of_mean: float
    mu: float
    potential: bool = False

    @property
    def rms(self) -> float:
        """sqrt(mean of L_m^2)."""
        return float(self.each.square().mean().sqrt())


class Task(ABC):
    """What clients work on, loss problems and saddle points alike: two attributes and four methods make one.

    Attributes:
        layout: names and shapes in a client's vector.
        num_examples: [N] int64 on the host, samples of each client; one without any takes no step.
        no_local_steps: why more than one step between two averages cannot work here; None where it can.
        holds_out: whether clients have samples that they do not train on (`data.client_test`).
        prox: of what is added to the mean field: a set to stay in, or a penalty.
        constants: what is known of the fields; None where nothing is.
    """

    layout: Layout
    num_examples: Tensor
    no_local_steps: str | None = None
    holds_out: bool = False
    prox: Prox = FREE

    @property
    def constants(self) -> Constants | None:
        return None

    @abstractmethod
    def init(self, seed: int) -> Tensor:
        """[P]: where training starts."""

    @abstractmethod
    def batches(self, ids: Tensor, streams: Streams, schedule: Schedule) -> Batches:
        """The minibatches of a stack; `fedsim.tasks.batches.BatchPlan` cuts them from samples by the schedule.

        Args:
            ids: [C] on the host, clients, those with most samples first.
            streams: random numbers of theirs, and the ids on the device.
            schedule: epochs or steps, batch size, order.
        """

    @abstractmethod
    def field(self, x: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(gradient or operator [C, P], loss [C]) at x [C, P], the mean over each client's samples in one batch."""

    @abstractmethod
    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        """How good x [P] is, on held-out data or against a known solution; as many metrics as there are names."""

    def evaluate_clients(self, x: Tensor, pool: Pool) -> dict[str, Tensor]:
        """{metric: [N]} of x [P] on every client's own data; NaN for clients without any."""
        return {}

    def evaluate_own(self, ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        """How good each client's own model is on the samples that it holds out.

        Args:
            ids: [C] on the host, clients.
            x: [C, P], a model for each.

        Returns:
            {"examples": [C] float64 how many these are, metric: [C] float64, NaN for clients without any}.
        """
        raise AssertionError("a task that holds out nothing is not asked")

    def session(self, x: Tensor) -> Session:
        """The task bound to a stack x [C, P], whose steps may share preparations."""
        return PlainSession(self.field, x)

    def factored_run(self, x: Tensor, batches: Any, walk: Walk) -> tuple[Factors, Tensor] | None:
        """A whole run at once, where that costs less than its steps; else None.

        Args:
            x: where clients start, [P] or [C, P].
            batches: of the stack.
            walk: its steps.

        Returns:
            (sum of each client's gradients g, each times (1 - lr * pull)^(steps after it); sum of its losses [C]).
        """
        return None

    def factored_gradients(self, x: Tensor, batches: Any) -> tuple[Factors, Tensor] | None:
        """(sum of each client's gradients of all batches at x [P], sum of its losses [C]) in factors; else None."""
        return None

    def lacks(self, need: str) -> str | None:
        """Why `oracle` cannot supply a need of an optimizer (its name in `Rule.needs`); None where it can."""
        return "this task gives a gradient alone"

    def oracle(self, batch: Any, buffers: Tensor) -> Oracle:
        """One minibatch as functions of its clients' points, for needs that the task does not lack.

        Args:
            batch: of k clients, in the task's own form.
            buffers: [k, P - n], the clients' entries that are not trained; they are read, not updated.
        """
        raise AssertionError("a task that lacks every need is not asked")

    def pictures(self, x: Tensor) -> dict[str, Tensor]:
        """{title: [rows, columns, height, width, 1 or 3] in [0, 1]}: images, grey or coloured, that show x [P]."""
        return {}

    def poison(self, ids: Tensor, attack: Poison) -> None:
        """Let some clients [b] train on what an attacker makes of their samples; evaluation says how it succeeds.

        Raises:
            ValueError: where there are no labels, or the attack does not suit the samples.
        """
        raise ValueError("poisons labels, which this task does not have")

    def to(self, device: torch.device) -> Task:
        """The task with its data on a device.

        Raises:
            ValueError: for another than the cpu, unless the task has a method of its own that moves its data.
        """
        if device.type != "cpu":
            raise ValueError(f"{type(self).__name__} has no method to(device); write one, or set runtime.device: cpu")
        return self


class Poison(Protocol):
    """An attack on data."""

    @property
    def share(self) -> float:
        """Of a client's samples that are poisoned."""
        ...

    def wanted(self, inputs: Tree, targets: Tensor, num_classes: int) -> tuple[Tree, Tensor]:
        """Samples [..., ...] with labels [...] as the attacker shows them, and the labels that it wants for them.

        It writes to neither.
        """
        ...


class Pool(Protocol):
    """The executor's workers, wherever they are, for a task's own work beside that of clients."""

    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        """[work(piece, **shared) for each piece], in the pieces' order.

        Args:
            work: a method of the task; workers elsewhere call that of their own copy by its name.
            pieces: of the work, independent of each other.
            shared: what all of them get.
        """
        ...
