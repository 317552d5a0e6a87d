"""Adversarial training: weights that go down a loss, and a perturbation of each class that goes up.

    min_w max_r f, f the mean over clients of f_m(w, r) = mean over j of l(model_w(x_j + r_{y_j}), y_j) - rho |r|^2

One perturbation for all samples of a class is class-wise universal adversarial training (Benz, Zhang, Karjauv, Kweon.
arXiv:2104.03000); of a linear model of two classes it is the worst of every single sample. The price rho, in place of
a bound on |r| or beside it, is from Sinha, Namkoong, Volpi, Duchi (arXiv:1710.10571). r is an entry of the vector as
the weights are: shared where all entries are, and each client's own where a strategy keeps `perturbation.weight` at
home, as in FedRobust (Reisizadeh, Farnia, Pedarsani, Jadbabaie. arXiv:2006.08907).

Letters: C clients of a stack, P entries of z = (r, w), K classes, d numbers of a sample, n held-out samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.data.federated import FederatedData
from fedsim.engine.functional import outputs_of
from fedsim.engine.losses import per_sample
from fedsim.params import Layout
from fedsim.task import Pool, Session
from fedsim.tasks.pictures import grid
from fedsim.tasks.supervised import SupervisedTask, pieces
from fedsim.trees import Tree, one

NAME = "perturbation.weight"
MAX_STEPS = 20  # of the attack that an evaluation makes
FAR = 1e9  # a step after which a set's projection is its farthest point in that direction
SHOWN = 10  # samples in a picture


class Perturbed(nn.Module):
    """A model that sees its samples moved by a parameter, a row [d] of it for each class.

    Args:
        model: takes samples [B, ...].
        input_shape: of a sample.
        num_classes: K.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.perturbation = nn.Embedding(num_classes, prod(input_shape))
        nn.init.zeros_(self.perturbation.weight)
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        return self.model(inputs + self.perturbation(labels).reshape(inputs.shape))


def with_labels(data: FederatedData) -> FederatedData:
    """The data with classes [n] beside its samples, as inputs of `Perturbed`.

    Raises:
        ValueError: for samples that are not one tensor of numbers, each with one class.
    """

    def beside(samples: Tree, labels: Tree) -> Tree:
        if not isinstance(samples, Tensor) or not samples.is_floating_point():
            raise ValueError("a perturbation needs samples that are one tensor of numbers each")
        if not isinstance(labels, Tensor) or labels.ndim != 1 or (len(labels) and int(labels.min()) < 0):
            raise ValueError("perturbations are one for each class, and samples here have not one class each")
        return {"inputs": samples, "labels": labels}

    test = beside(data.test_inputs, data.test_targets)
    return replace(data, inputs=beside(data.inputs, data.targets), test_inputs=test)


@dataclass(frozen=True)
class Ascent(Session):
    """Gradients of (r, w) as the operator of the game: up in r, which has its price.

    Args:
        session: of the gradients.
        layout: of z.
        x: [C, P].
        rho: the price.
    """

    session: Session
    layout: Layout
    x: Tensor
    rho: float

    def gradient(self, batch: Any, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        g, loss = self.session.gradient(batch, out)
        r = self.layout.views(self.x)[NAME]
        self.layout.views(g)[NAME].neg_().add_(r, alpha=2 * self.rho)
        return g, loss - self.rho * r.flatten(1).square().sum(1) if self.rho else loss


class AdversarialTask(SupervisedTask):
    """See the module's head.

    Args:
        args, more: those of `SupervisedTask`; data are of `with_labels`, the module is a `Perturbed`, and `prox` says
            where r may go.
        rho: what |r|^2 costs; above 0 where nothing bounds r.
    """

    def __init__(self, *args: Any, rho: float = 0.0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.rho = rho

    def session(self, x: Tensor) -> Session:
        return Ascent(super().session(x), self.layout, x, self.rho)

    def lacks(self, need: str) -> str | None:
        return "a saddle point is not minimised"

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        """Loss and metrics on held-out samples as they are, and moved by the perturbations of `attack`."""
        clean = super().evaluate(self.moved(x, 0.0), pool)
        if not clean:
            return {}
        attacked = super().evaluate(self.moved(x, self.attack(x, pool)), pool)
        return clean | {name.replace("test_", "test_adversarial_", 1): value for name, value in attacked.items()}

    def evaluate_clients(self, x: Tensor, pool: Pool) -> dict[str, Tensor]:
        """[N] of samples as they are."""
        return super().evaluate_clients(self.moved(x, 0.0), pool)

    def moved(self, x: Tensor, r: Tensor | float) -> Tensor:
        """x [P] with another perturbation."""
        x = x.clone()
        self.layout.views(x)[NAME][:] = r
        return x

    def attack(self, x: Tensor, pool: Pool) -> Tensor:
        """[K, d]: perturbations of held-out samples that the weights of x [P] bear badly, whatever r is in x.

        From zero on they go to where the linearised loss, less the price, is largest, as long as that raises the loss
        itself. For losses that are convex in r each step does (Journee, Nesterov, Richtarik, Sepulchre. Generalized
        power method. JMLR 11. 2010), and for a linear model of two classes the first leads to the worst there is.
        """
        best, most = torch.zeros_like(self.layout.views(x)[NAME]), -torch.inf
        r = best
        for _ in range(MAX_STEPS):
            loss, g = self._held_out_gradient(x, r, pool)
            value = loss - self.rho * float(r.square().sum())
            if not value > most:
                break
            best, most = r, value
            step = 1 / (2 * self.rho) if self.rho else FAR / max(float(g.abs().max()), 1e-30)
            r = self.prox((step * g).flatten(), step).view(r.shape)
        return best

    def _held_out_gradient(self, x: Tensor, r: Tensor, pool: Pool) -> tuple[float, Tensor]:
        """(mean loss of held-out samples moved by r, its gradient by r)."""
        n = len(one(self.data.test_targets))
        mean = torch.stack(pool.map(self._ascent, pieces(0, n), x=x, r=r)).sum(0) / n
        return float(mean[0]), mean[1:].view(r.shape)

    def _ascent(self, span: slice, x: Tensor, r: Tensor) -> Tensor:
        """[1 + K d]: loss and gradient of a piece of the held-out samples."""
        trained, buffers = self._program.tensors.of(x)
        inputs, targets = (self.read(part, span) for part in (self.data.test_inputs, self.data.test_targets))
        own = r.clone().requires_grad_()
        with torch.enable_grad():
            tensors = {**trained, **buffers, NAME: own}
            outputs = outputs_of(self._program.modules.get(training=False), tensors, inputs)
            loss = per_sample(self.sample_loss(outputs.to(x.dtype), targets)).sum()
            (g,) = torch.autograd.grad(loss, own)
        return torch.cat([loss.detach()[None], g.flatten()])

    def pictures(self, x: Tensor) -> dict[str, Tensor]:
        """The perturbations that the server has, and what samples become with them; nothing while they are zero."""
        some = self.data.test_inputs if len(one(self.data.test_targets)) else self.data.inputs
        assert isinstance(some, dict)
        clean, labels = some["inputs"][:SHOWN].cpu(), some["labels"][:SHOWN].cpu()
        r = self.layout.views(x.cpu())[NAME].unflatten(1, clean.shape[1:])
        most = float(r.abs().max())
        if not most:
            return {}
        low, high = float(clean.min()), float(clean.max())
        both = torch.cat([clean, clean + r[labels]])
        shown = grid("Perturbation of each class (grey is none)", r, SHOWN, -most, most)
        return shown | grid("Samples as they are, and with it", both, SHOWN, low, high)
