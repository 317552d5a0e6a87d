"""What a run works on, in a line each that another data set or module would not have: a resume compares them.

The resolved file holds them beside `versions`, and no run is made from them. They go by shapes, counts and a hash of
numbers, since a path or a class may stand for something else by the time of a resume.
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
        out.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def _numbers(layout: Layout) -> str:
    return f"{layout.num_trainable:,} numbers that train"


def _shapes(tree: Tree) -> str:
    shapes = each(lambda t: list(t.shape[1:]), tree)  # type: ignore[arg-type, return-value]
    return str(shapes)
