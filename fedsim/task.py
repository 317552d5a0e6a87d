"""What a task is: a field (gradient or operator) for every client, and how good a solution is.

Letters: N clients, C clients of a stack, P entries of a client's vector, K local steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fedsim.params import Layout
from fedsim.streams import Streams

if TYPE_CHECKING:
    from fedsim.cohort import Cohort


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a client goes through its own data.

    Args:
        epochs: passes over the client's data, or None when `steps` is given.
        steps: local steps, or None when `epochs` is given.
        batch_size: samples of a step; None for all of a client's data.
        shuffle: a fresh keyed order every epoch; False keeps the order of the data.
    """

    epochs: int | None = 1
    steps: int | None = None
    batch_size: int | None = 20
    shuffle: bool = True

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("local: give either epochs or steps, not both and not neither")
        for name in ("epochs", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"local.{name} must be at least 1, got {value}")

    def num_steps(self, num_examples: Tensor) -> Tensor:
        """[C] int64 local steps of clients with these sample counts; a client without data takes none."""
        if self.steps is not None:
            return torch.where(num_examples > 0, self.steps, 0)
        assert self.epochs is not None
        return self.epochs * self.steps_per_epoch(num_examples)

    def steps_per_epoch(self, num_examples: Tensor) -> Tensor:
        """[C] int64: minibatches in one pass, the last of which may be short."""
        if self.batch_size is None:
            return (num_examples > 0).to(torch.int64)
        return (num_examples + self.batch_size - 1) // self.batch_size


class Batches(Protocol):
    """The minibatches of a stack, step by step; clients that take more steps come first."""

    num_steps: Tensor

    def __len__(self) -> int:
        """Steps of the busiest client."""
        ...

    def active(self, step: int) -> int:
        """How many of the first clients still take this step."""
        ...

    def __getitem__(self, step: int) -> Any:
        """The batch of the active clients, in the task's own form."""
        ...


class Session(Protocol):
    """A task, or its engine, bound to one stack x [C, P] for the steps of one local run.

    It belongs to the thread that made it; drop it, and its views of x are gone.
    """

    def gradient(self, batch: Any, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(gradient or operator [C, P], loss [C]) at the present x; batches are in the task's own form."""
        ...

    def sgd_step_(
        self,
        batch: Any,
        lr: float,
        *,
        scale: float = 1.0,
        shift: Tensor | None = None,
        grad_sum: Tensor | None = None,
    ) -> Tensor | None:
        """One step x <- x - lr * (scale * g + shift) in place, fused into the backward products.

        Equal to `gradient` and then the update, up to float rounding. After K steps of one lr the sum of the raw
        gradients is also ((x_0 - x_K) / lr - K * shift) / scale: that costs nothing on the way, `grad_sum` does.

        Args:
            batch: of the C clients.
            lr: the learning rate.
            scale: of the gradient g.
            shift: [P] or [C, P]; its entries for buffers are ignored.
            grad_sum: [C, P]; g is added to it.

        Returns:
            loss [C] before the step, or None where steps are not fused (then nothing was touched).
        """
        ...

    def weighted_sum(self, batch: Any, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """The sum over each client's samples of their gradients, tensor by tensor times a weight.

        Args:
            batch: of the C clients; the gradient of padding is zero.
            weigh: [C, B, L] weights from the squared norms [C, B, L] of samples' gradients by each of the L trained
                tensors, in the layout's order.

        Returns:
            ([C, P], mean loss [C]), or None where single samples cannot be told apart.
        """
        ...


@dataclass(frozen=True)
class PlainSession:
    """Steps that share nothing and fuse nothing: what a task without an engine offers."""

    field: Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Tensor]]
    x: Tensor

    def gradient(self, batch: Any, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.field(self.x, batch, out)

    def sgd_step_(
        self,
        batch: Any,
        lr: float,
        *,
        scale: float = 1.0,
        shift: Tensor | None = None,
        grad_sum: Tensor | None = None,
    ) -> Tensor | None:
        return None

    def weighted_sum(self, batch: Any, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        return None


class Factored(Protocol):
    """Vectors [C, P] of a stack that are kept in factors."""

    def __len__(self) -> int:
        """C."""
        ...

    def __mul__(self, factor: float | Tensor) -> Factored:
        """The same vectors times a number, or times one for each client [C]."""
        ...

    def dense(self) -> Tensor:
        """[C, P]."""
        ...

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[P]: the sum of weights [C] times the vectors, which need not be formed for it."""
        ...


class Task(Protocol):
    """Loss problems and saddle points alike."""

    layout: Layout
    num_examples: Tensor

    def init(self, seed: int) -> Tensor:
        """[P]: where training starts."""
        ...

    def batches(self, cohort: Cohort, schedule: Schedule) -> Batches:
        """The minibatches of a cohort."""
        ...

    def field(self, x: Tensor, batch: Any, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(gradient or operator [C, P], loss [C]) at x [C, P] on one batch."""
        ...

    def batch_sizes(self, batch: Any) -> Tensor:
        """[C] samples of each client in a batch, padding not counted."""
        ...

    def plain_run(
        self, x: Tensor, batches: Any, lr: float, scale: float = 1.0, terms: Sequence[tuple[float, Tensor]] = ()
    ) -> tuple[Factored, Tensor] | None:
        """A whole run of x <- x - lr * (scale * g + shift) at once, where that costs less than its steps; else None.

        Args:
            x: where clients start, [P] or [C, P].
            batches: of the stack.
            lr: of the steps.
            scale: of the gradients g.
            terms: the shift, a sum of (weight, tensor [P] or [C, P]).

        Returns:
            (sum of each client's gradients g, sum of the losses of its steps [C]).
        """
        ...

    def session(self, x: Tensor) -> Session:
        """The task bound to a stack x [C, P], whose steps may share preparations."""
        ...

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        """How good x [P] is, on held-out data or against a known solution."""
        ...

    def evaluate_clients(self, x: Tensor, pool: Pool) -> dict[str, Tensor]:
        """{metric: [N]} of x [P] on every client's own data; NaN for clients without any."""
        ...


class Pool(Protocol):
    """Runs independent pieces of work on the executor's own workers and returns their results in order."""

    def map(self, function: Any, pieces: list[Any]) -> list[Any]: ...


def stream_of(ids: Tensor, seed: int, job: int = 0) -> Streams:
    """Streams of some clients for something that is not a job of theirs (drawing a task's own constants)."""
    return Streams(seed, ids, torch.full_like(ids, job))
