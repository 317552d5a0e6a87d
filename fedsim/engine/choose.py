"""The rule behind `engine`, `stack` and `stacks: auto`: sizes, layer kinds and the machine decide, never a timing.

Of the machine it asks for a GPU, its memory, and a C++ compiler. A timing would make the bits of a run depend on what
else the machine did. Measured figures behind the constants are in docs/benchmarks.md. `fedsim tune` measures here and
prints the keys to set.

Letters: C clients in a stack (its width), B samples of a minibatch, P entries of a client's vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import nn

from fedsim.engine.calls import Unsupported
from fedsim.engine.losses import Loss, cross_entropy
from fedsim.engine.low_rank import chain_of
from fedsim.engine.native import suits
from fedsim.engine.noise import keyed_copy
from fedsim.engine.ops import Linear
from fedsim.engine.precision import check_precision
from fedsim.engine.tape import Tape, trace
from fedsim.params import Layout
from fedsim.trees import Tree, tensors

STACK_BYTES = 4 * 2**20  # of parameters: stacks this small stay in a core's caches from step to step
LOW_RANK_BYTES = 8 * 2**20  # of layer inputs and output gradients in one stack of low-rank changes
MAX_WIDTH_LOW_RANK = 64
MANY_ROWS = 256  # of a minibatch in a linear layer: from here on a step costs far more than reading the weights
WIDE_STACK_BYTES = 16 * 2**20  # of parameters where products have so many rows
STACK_ROWS = 3200  # of a stack in such a product: with more of them activations leave the caches
GPU_SHARE = 0.5  # of a GPU's memory for one stack; the rest is for data, evaluation and torch itself
GPU_COPIES = 6  # vectors of a client alive at once: received, local, gradient, direction, two of an optimizer
LEAST_COPIES = 3  # the server's model, the received one, the local one
MAX_WIDTH_CPU = 16  # from 8 clients on the cost of a call no longer shows, and more stacks keep more cores busy
MIN_WIDTH_VMAP = 4  # a stack under torch.func costs more than its clients one by one, unless they are many
MAX_WIDTH_GPU = 512
SHARES = 4  # stacks for each worker from which on it matters little that some workers get one more than others
SPLIT_BYTES = 2**19  # of parameters: below this a stack's calls cost a core more than its products

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Plan:
    """How clients will be computed.

    Args:
        engine: name of the engine.
        width: clients in a stack at most.
        reason: one sentence for people.
        native: the end of a classifier runs in C++.
        graphs: steps are replayed as CUDA graphs.
        data: where samples lie beside a GPU: on the device, or on the host.
    """

    engine: str
    width: int
    reason: str
    native: bool = False
    graphs: bool = False
    data: Literal["device", "host"] = "host"


def choose_engine(
    module: nn.Module,
    layout: Layout,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    steps: int = 1,
    num_clients: int = 1,
    engine: str = "auto",
    stack: int | str = "auto",
    native: bool | str = "auto",
    precision: str = "fp32",
    plain: bool = False,
    loss: Loss = cross_entropy,
    sample: Tree | None = None,
) -> Plan:
    """The engine and the stack width for a module.

    Args:
        module: the model.
        layout: of the module.
        device: where stacks will lie.
        batch_size: B.
        steps: of a local run, at most.
        num_clients: how many train at once, the cohort. It is cut into an even number of equal stacks if it fills two.
        engine: a name, or auto.
        stack: a width, or auto.
        native: whether the stacked engine takes a classifier's end in C++, or auto.
        precision: fp32, tf32 or bf16.
        plain: local steps are plain SGD, corrected or not, which chains of linear layers can take in factors.
        loss: per sample.
        sample: one sample [...], by which the rule sees whether the stacked engine knows every layer; taken for
            granted without.

    Raises:
        ValueError: for a width below one, an unknown precision, native with another engine than stacked, or a model
            that is too large for the GPU.
    """
    check_precision(precision)
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    name, why = _engine(module, engine, on_cpu and precision != "bf16")
    if native is True and name != "stacked":
        raise ValueError(f"native=true is an option of engine stacked, got engine {name}; leave native at auto")
    in_cpp = name == "stacked" and (suits(module, loss, device, precision) if native == "auto" else bool(native))
    if stack != "auto":
        if not isinstance(stack, int) or stack < 1:
            raise ValueError(f"stack must be auto or a positive number of clients, got {stack!r}")
        return Plan(name, stack, why + f"stacks of {stack} as set", in_cpp)
    width, reason = _width(module, layout, device, batch_size, name, sample)
    if precision == "bf16" and on_cpu:
        reason += "; bf16 products are seldom faster than fp32 ones on a CPU"
    if plain and name == "stacked" and on_cpu:
        width, reason = _in_factors(module, batch_size * steps, precision) or (width, reason)
    even = _even(num_clients, width)
    if even < width:
        return Plan(name, even, f"{why}{num_clients} clients in equal stacks, at most {width}: {reason}", in_cpp)
    return Plan(name, width, why + reason, in_cpp)


def graphed(engine: str, device: torch.device, graphs: bool | str = "auto") -> bool:
    """Whether an engine's steps are replayed as CUDA graphs.

    Those of `compiled` are not, as torch compiles anew for tensors that lie otherwise, such as those of a graph. Nor
    are those of somebody else's engine unless they say so, for it isn't known what it keeps from step to step.

    Args:
        engine: its name.
        device: where stacks will lie.
        graphs: as the file says, or auto.

    Raises:
        ValueError: where there can be none.
    """
    if graphs == "auto":
        return device.type == "cuda" and engine in ("loop", "stacked")
    if graphs and (device.type != "cuda" or engine == "compiled"):
        raise ValueError(
            f"graphs=true is for a GPU and engine loop or stacked, got {device} and {engine}; take graphs=auto"
        )
    return bool(graphs)


def enough_stacks(num_clients: int, width: int, workers: int, layout: Layout, device: torch.device | str) -> int:
    """Into how many stacks a cohort is cut at least, so that every worker has one and they finish together.

    On a CPU `choose` has made the number even, which is all that two workers need.

    >>> layout = Layout.of({"w": (784, 200)})
    >>> [enough_stacks(100, 25, workers, layout, "cpu") for workers in (1, 2, 4, 8)]
    [1, 1, 4, 8]
    >>> [enough_stacks(500, 500, workers, layout, "cuda") for workers in (1, 2, 8)]
    [1, 2, 8]

    Args:
        num_clients: of the cohort.
        width: clients of a stack at most.
        workers: of the run.
        layout: of the model.
        device: where stacks will lie.
    """
    on_cpu = torch.device(device).type == "cpu"
    needed = -(-num_clients // width)
    if width == 1 or workers <= (2 if on_cpu else 1) or needed > SHARES * workers:
        return 1
    narrowest = -(-SPLIT_BYTES // (4 * layout.size)) if on_cpu else 1
    return max(min(-(-needed // workers) * workers, num_clients // narrowest), 1)


def _in_factors(module: nn.Module, samples: int, precision: str) -> tuple[int, str] | None:
    """(width, reason) where local runs of so many samples cost less in factors (`low_rank_run`)."""
    chain = chain_of(module)
    if chain is None or not chain.worthwhile(samples):
        return None
    each = 4 * samples * sum(i + o for o, i in chain.shapes)
    width = min(max(1, LOW_RANK_BYTES // each), MAX_WIDTH_LOW_RANK)
    reason = f"clients see fewer samples than layers are wide, so {width} of them are kept as low-rank changes"
    kept = "" if precision == "fp32" else f", whose products stay fp32: faster here than {precision} steps"
    return width, reason + kept


def memory_bytes(layout: Layout, width: int, batch_size: int) -> int:
    """A rough count of the memory of one stack: a client's vectors, and activations as large as one per sample row."""
    return width * 4 * (GPU_COPIES * layout.size + batch_size * _activations(layout))


def _engine(module: nn.Module, engine: str, in_one_call: bool) -> tuple[str, str]:
    """(name, why). In one call torch takes a recurrent layer faster than a stack does in many small ones."""
    if engine != "auto":
        return engine, f"engine {engine} as set; "
    if in_one_call and any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
        return "loop", "torch has one call for a recurrent layer; "
    return "stacked", ""


def _width(
    module: nn.Module, layout: Layout, device: torch.device, batch_size: int, engine: str, sample: Tree | None
) -> tuple[int, str]:
    if engine == "loop":
        return 1, "the loop engine takes one client at a time"
    if device.type != "cpu":
        return _gpu_width(module, layout, device, batch_size, sample)
    # a convolution that cuts an image into patches is a linear layer, and a frozen one sees all clients at once
    images = [m for m in module.modules() if isinstance(m, _CONVOLUTIONS) and m.stride != m.kernel_size]
    if any(m.weight.requires_grad for m in images):
        return 1, "on a CPU convolutions are fastest one client at a time"
    each = 4 * layout.size
    tape, unknown = _tape(module, sample) if engine == "stacked" and sample is not None else (None, "")
    rows = 1 if tape is None else batch_size * _positions(tape)
    many_rows = rows >= MANY_ROWS
    most_bytes, most = (WIDE_STACK_BYTES, STACK_ROWS // rows) if many_rows else (STACK_BYTES, MAX_WIDTH_CPU)
    width = max(1, min(most_bytes // each, most))
    if unknown and width < MIN_WIDTH_VMAP:
        return 1, f"without a tape ({unknown}) one client at a time is fastest"
    how = f"; under torch.func.vmap, without a tape ({unknown})" if unknown else ""
    size = f"({width * each / 2**20:.1f} MiB)"
    if width == 1:
        return 1, f"one client's parameters {size} fill a core's caches{how}"
    if many_rows:
        return width, f"{width} clients' parameters {size} are read once for the many rows of every product{how}"
    return width, f"{width} clients' parameters {size} stay in a core's caches between steps{how}"


def _tape(module: nn.Module, sample: Tree) -> tuple[Tape | None, str]:
    """(the tape, or None and why there is none)."""
    try:
        return trace(keyed_copy(module), sample), ""
    except Unsupported as unknown:
        return None, str(unknown)


def _positions(tape: Tape) -> int:
    """Rows of a sample in the products of linear layers, at most."""
    return max((prod(spec.shape[:-1]) for spec in tape.specs if spec.make is Linear), default=1)


def _even(num_clients: int, width: int) -> int:
    """The width that cuts a small cohort into an even number of equal stacks, so that two workers finish together."""
    num_stacks = max(-(-num_clients // width), 1)
    if num_stacks > 8:
        return width
    if num_stacks > 1:
        num_stacks += num_stacks % 2
    return max(-(-num_clients // num_stacks), 1)


def _gpu_width(
    module: nn.Module, layout: Layout, device: torch.device, batch_size: int, sample: Tree | None
) -> tuple[int, str]:
    total = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 8 * 2**30
    if (least := 4 * LEAST_COPIES * layout.size) > total:
        raise ValueError(
            f"{layout.size:,} parameters take {least / 2**30:,.1f} GiB for one client alone, and the GPU has "
            f"{total / 2**30:,.1f}; take a smaller model, a larger card, or device=cpu"
        )
    each = memory_bytes(layout, 1, batch_size) + 4 * batch_size * _frozen_activations(module, sample)
    width = min(max(1, int(GPU_SHARE * total) // each), MAX_WIDTH_GPU)
    need = width * each / 2**30
    return width, f"a GPU takes as many clients as fit in half its memory, up to {MAX_WIDTH_GPU}: about {need:.1f} GiB"


def _activations(layout: Layout) -> int:
    """Numbers kept per sample, guessed from the layers' output widths: 1,024 positions for each filter of an image."""
    numbers = 0
    for shape in layout.trainable.shapes:
        if len(shape) == 4:
            numbers += shape[0] * 1024
        elif len(shape) == 2:
            numbers += shape[0] + shape[1]
    return 2 * numbers  # values and their gradients


def _frozen_activations(module: nn.Module, sample: Tree | None) -> int:
    """The same of layers that are frozen: a sample of class indices has as many positions as numbers."""
    indices = [] if sample is None else [t for t in tensors(sample).values() if not t.is_floating_point()]
    positions = max((t.numel() for t in indices), default=1)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    frozen = {k: tuple(p.shape) for k, p in module.named_parameters() if not (p.requires_grad or id(p) in tables)}
    return positions * _activations(Layout.of(frozen))
