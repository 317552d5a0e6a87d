"""What a run works on, in a line each that another data set or module would not have: a resume compares them.

The resolved file holds them beside `versions`, and no run is made from them. They go by shapes, counts and a hash of
numbers, since a path or a class may stand for something else by the time of a resume. Whole numbers (labels, who has
which row) count bit by bit. Others count by a sum, since a run may move to a processor that makes other last bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor

from fedsim.compose.supervised import Samples
from fedsim.data.federated import FederatedData
from fedsim.params import Layout
from fedsim.task import Task
from fedsim.trees import Tree, each, tensors

WHOLE, SOME = 1 << 22, 1 << 14  # a larger tensor counts by so many of its numbers, since it may lie in a file


def identity_of(problem: Task | Samples) -> dict[str, str]:
    """{what: in one line}.

    Beside data, a module's layers and what is frozen of it count, not where its training starts: a resume has that from
    the checkpoint.
    """
    layout = _hashed([repr(problem.layout)], [])
    if isinstance(problem, Task):
        return {"task": f"{_numbers(problem.layout)}, {_hashed([layout], [problem.num_examples])}"}
    module, data = problem.module, problem.data
    frozen = [p for _, p in sorted(module.named_parameters()) if not p.requires_grad]
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(module))  # of functions, which lie elsewhere in every process
    return {
        "data": f"{len(data):,} rows of {_shapes(data.inputs)}, {data.num_clients:,} clients, {_hash_of_data(data)}",
        "model": f"{type(module).__name__}, {_numbers(problem.layout)}, {_hashed([layout, layers], frozen)}",
    }


def _hash_of_data(data: FederatedData) -> str:
    parts = [data.inputs, data.targets, data.test_inputs, data.test_targets]
    found = [t for part in parts for _, t in sorted(tensors(part).items())]
    owners = [] if data.test_owners is None else [data.test_owners]
    return _hashed([str(data.num_classes)], [*found, data.offsets, data.order, *owners])


def _hashed(texts: Iterable[str], numbers: Iterable[Tensor]) -> str:
    """Eight digits that tell these from others."""
    out = blake2b(digest_size=4)
    for text in texts:
        out.update(text.encode())
    for t in numbers:
        flat = t.detach().flatten()
        step = 1 if len(flat) <= WHOLE else len(flat) // SOME
        out.update(f"{list(t.shape)} {t.dtype}".encode())
        some = flat[::step].cpu()
        out.update(_outline(some).encode() if some.is_floating_point() else some.numpy().tobytes())
    return out.hexdigest()


def _outline(numbers: Tensor) -> str:
    """Four digits of a sum [n] -> one number, in which each counts by its place.

    Last bits move the sum by 1e-7 of itself, which shows once in some thousand tensors. A number that moves by as much
    as all are large (root mean square) moves it by about 1 / sqrt(n), which shows up to a million numbers.
    """
    weights = torch.arange(1, len(numbers) + 1, dtype=torch.float64).square_().sin_()  # the same ones everywhere
    return f"{float(weights @ numbers.double()):.3e}"


def _numbers(layout: Layout) -> str:
    return f"{layout.num_trainable:,} numbers that train"


def _shapes(tree: Tree) -> str:
    shapes = each(lambda t: list(t.shape[1:]), tree)  # type: ignore[arg-type, return-value]
    return str(shapes)
