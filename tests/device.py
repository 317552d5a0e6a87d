"""A pretend GPU for machines without one: tensors that say they lie on cuda:0 and compute on the CPU.

    with pretend_gpu() as counts:
        x = torch.ones(3, device="cuda")
        x + torch.ones(3)               # RuntimeError, as on a GPU
        x.sum().item()
    counts.launches, counts.waits       # 2, 1

A factory or `.to("cuda")` ends in the kernels that are registered here for torch's dispatch key CUDA, which a build
for CPUs leaves free. They give a `Pretend`, whose operations come to `__torch_dispatch__`: there they are checked,
counted and done on the CPU tensors inside. So there is no mode to be in: workers' threads, autograd, torch.func and
modules just work. The numbers are a CPU's; kernels and torch.compile of a GPU are not covered. Its graphs are those of
`tests.device_graphs`; streams, and races between them, are in `tests.device_streams`.

What counts: a launch is an operation that is neither a view nor an allocation, at least one kernel on a GPU. A wait is
where the host stands until the device has done all its work: a number, a copy to or from memory that is not pinned, a
shape that depends on data.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before torch.compile is replaced: it keeps a table of torch's functions
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tests import device_graphs as graphs

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
NOT_CALLERS = (os.path.dirname(torch.__file__), os.path.splitext(__file__)[0])
FREE = {"_reshape_alias", "_unsafe_view", "alias", "detach", "detach_", "empty_like", "is_same_size", "lift_fresh"}
FREE |= {"new_empty", "new_empty_strided", "resize_", "set_", "sym_size", "sym_stride"}
SHAPED_BY_DATA = {"_unique2", "bincount", "masked_select", "nonzero", "unique_consecutive", "unique_dim"}
WAITS = SHAPED_BY_DATA | {"_linalg_eigh", "_linalg_svd", "_local_scalar_dense", "equal", "linalg_lstsq", "multinomial"}
INDEXED = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}
TAKES_NUMBERS = {"addcdiv", "addcdiv_", "addcmul", "addcmul_", "clamp", "clamp_", "fill", "fill_", "index_put"}
TAKES_NUMBERS |= {"index_put_", "lerp", "lerp_", "masked_fill", "masked_fill_", "where"}


@dataclass
class Counts:
    """What happened on the device, all threads together.

    Args:
        launches: operations.
        waits: of the host for the device.
        bytes_up: from the host to the device.
        bytes_down: from the device to the host.
        places: {(launches, waits, bytes_up or bytes_down; file and line of the caller): how many}.
    """

    launches: int = 0
    waits: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    places: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, kind: str, number: int = 1) -> None:
        """Count something that just happens."""
        if kind == "waits":
            graphs.refuse_to_wait()
        if graphs.capturing() is not None:
            return
        with self._lock:
            setattr(self, kind, getattr(self, kind) + number)
            self.places[kind, *_caller()] += number

    def where(self, kind: str, most: int = 10) -> list[tuple[str, int]]:
        """The lines where most of a kind happen, for the message of a test that fails."""
        found = Counter({(file, line): n for (k, file, line), n in self.places.items() if k == kind})
        return [(f"{os.path.relpath(file)}:{line}", n) for (file, line), n in found.most_common(most)]


_counts = Counts()  # of the running context
_watch: Any = None  # who is told of every operation: `tests.device_streams.Watch`


def _caller() -> tuple[str, int]:
    """File and line of the nearest frame outside torch and this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(NOT_CALLERS):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


class Pretend(Tensor):
    """A tensor on the pretend GPU; `inner` is where its numbers are."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # of this thread: a list as an index is copied where it is seen
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        if name == "copy_":
            return _copy_(*args, **kwargs)
        if name == "_to_copy":
            return _to_copy(func, *args, **kwargs)
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        _refuse_mixed(func, name, args, tensors)
        out = _inside(func, args, kwargs, tensors)
        if (watch := _watching()) is not None:
            watch.ran(func, args, kwargs, out)
        _count(func, name, args, kwargs, [t for t in (*tensors, *tree_leaves(out)) if isinstance(t, Pretend)])
        return out

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # what has this is swapped by nn.Module.to, not aliased
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Pretend:
        return Pretend(inner["inner"])

    def data_ptr(self) -> int:
        return (1 << 46) + self.inner.data_ptr()  # tells views apart; C++ of ours that reads there crashes, as it would

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("there is no memory on a device to share")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        wanted = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        return memo.setdefault(id(self), wanted)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.Tensor.to, (self.detach().cpu(), GPU)

    def __repr__(self, **kwargs: Any) -> str:
        return f"pretend({self.inner!r})"


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretend) else value


def _inside(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """The operation done on the CPU tensors inside; what it gives is on the device unless something else is asked."""
    on_gpu = kwargs.get("device") is None or torch.device(kwargs["device"]).type == "cuda"
    here = tree_map(_inner, kwargs) | ({"device": "cpu"} if kwargs.get("device") is not None else {})
    before = [t.shape for t in tensors]
    given = graphs.run(func, tree_map(_inner, args), here)
    if torch.Tag.inplace_view in func.tags:  # squeeze_ and the like: the outside follows the inside
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
        return args[0]
    assert before == [_inner(t).shape for t in tensors], f"{func} resized a tensor; give `out` its final shape"
    known = {id(t.inner): t for t in tensors if isinstance(t, Pretend)}

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor) or not on_gpu:
            return value
        return known[id(value)] if id(value) in known else Pretend(value)

    return tree_map(outside, given)


def _count(func: Any, name: str, args: Any, kwargs: Any, tensors: list[Pretend]) -> None:
    if func.is_view or name in FREE:
        return
    if any(t.numel() for t in tensors):
        _counts.add("launches")
    by_mask = False
    if name in INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # one number written by one mask is done without asking how many entries that makes
        fills = len(args) > 2 and args[2].numel() == 1 and len(masks) == sum(i is not None for i in args[1]) == 1
        by_mask = bool(masks) and not fills
    if name in WAITS or by_mask or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _wait()


def _to_copy(func: Any, source: Pretend, **kwargs: Any) -> Tensor:
    """`.to` from the device, to itself or to the host."""
    target = torch.device(kwargs.get("device") or GPU)
    options = kwargs | ({"device": "cpu"} if "device" in kwargs else {})
    made: Tensor = graphs.run(func, (source.inner,), options)
    if target.type == "cuda":
        _counts.add("launches")
        return _used([source], made=Pretend(made))
    _used([source])
    _moved("bytes_down", source, kwargs.get("non_blocking", False))
    return made


def _copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _used([source], [to])
    if to.numel() and isinstance(to, Pretend) and isinstance(source, Pretend):
        _counts.add("launches")
    elif to.numel() and isinstance(to, Pretend):
        ahead = non_blocking and source.is_pinned()
        if ahead and (watch := _watching()) is not None:
            watch.sends(source)
        _moved("bytes_up", source, ahead, to)
    elif to.numel():
        _moved("bytes_down", source, non_blocking)
    graphs.run(aten.copy_.default, (_inner(to), _inner(source)), {})
    return to


def _moved(way: str, tensor: Tensor, ahead: bool = False, written: Tensor | None = None) -> None:
    _counts.add(way, tensor.numel() * tensor.element_size())
    if not ahead:
        _wait(written)


def _wait(written: Tensor | None = None) -> None:
    """The host waits until its stream is done, with what was copied to the device if anything was."""
    _counts.add("waits")
    if (watch := _watching()) is not None:
        watch.waited(written)


def _watching() -> Any:
    """Who is told of what this thread does; of what it captures a replay tells."""
    return None if graphs.capturing() else _watch


def _replayed(graph: graphs.Graph) -> None:
    """A graph was launched: one operation of its stream."""
    _counts.add("launches")
    if _watch is not None:
        _watch.used(*graph.accesses(), [])


def _used(reads: Sequence[Tensor], writes: Sequence[Tensor] = (), *, made: Any = None, free: bool = False) -> Any:
    """What was made, after telling who watches."""
    if (watch := _watching()) is not None:
        reads, writes = ([t for t in some if isinstance(t, Pretend)] for some in (reads, writes))
        watch.used(reads, writes, [] if made is None else [made], free)
    return made


def _refuse_mixed(func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise as torch does where tensors of the host meet tensors of the device.

    It lets pass: numbers (0-dim) in an elementwise operation, and indices from the host, which it copies.
    """
    strangers = [t for t in tensors if not isinstance(t, Pretend)]
    if not strangers:
        return
    written = args[0] if func._schema.is_mutable else None
    indices = [i for i in args[1] if i is not None] if name in INDEXED and isinstance(args[0], Pretend) else []
    takes_numbers = torch.Tag.pointwise in func.tags or name in TAKES_NUMBERS
    for stranger in strangers:
        if any(stranger is index for index in indices):
            _moved("bytes_up", stranger)
        elif stranger.ndim or stranger is written or not takes_numbers:
            shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors[:6])
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func}: {shapes})"
            )


def _factory(overload: Any) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        _counts.add("launches")
        return _used([], made=Pretend(graphs.run(overload, args, {**kwargs, "device": "cpu"})))

    return make


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **others: Any) -> Tensor:
    options = {"dtype": dtype, "memory_format": memory_format or torch.contiguous_format}
    return _used([], made=Pretend(graphs.run(aten.empty.memory_format, (size,), options)), free=True)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **others: Any) -> Tensor:
    made = Pretend(graphs.run(aten.empty_strided.default, (size, stride), {"dtype": dtype}))
    return _used([], made=made, free=True)


def why_not() -> str | None:
    """Why this machine can have no pretend GPU; None where it can."""
    if torch.version.cuda:
        return "this torch is built for real GPUs"
    return None if _compiler() else "there is no C++ compiler"


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _compiled() -> ctypes.CDLL:
    """device.cpp, compiled once and kept in the user's cache."""
    source, torch_folder, compiler = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent, _compiler()
    assert compiler is not None
    key = hashlib.sha256(f"{source.read_text()}{torch.__version__}{compiler}".encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsim" / "tests"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
        subprocess.run([compiler, *options, "-o", made, source, "-lc10", "-ltorch_cpu"], check=True)
        os.replace(made, library)  # whole or not at all, whoever else is writing it
    return ctypes.CDLL(str(library))


def _kernels() -> torch.library.Library:
    """What makes tensors under the dispatch key CUDA."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("empty.memory_format", _empty)
    library.impl("empty_strided", _empty_strided)
    for name in ("arange", "arange.start", "arange.start_step", "eye", "linspace", "randperm", "scalar_tensor"):
        packet, _, overload = name.partition(".")
        library.impl(name, _factory(getattr(getattr(aten, packet), overload or "default")))
    return library


if why_not() is None:  # when this is imported, for torch counts devices once, at the first backward pass
    _guard, _library = _compiled(), _kernels()


@contextmanager
def pretend_gpu() -> Iterator[Counts]:
    """A pretend GPU, and what is counted on it from here on; not to be nested."""
    global _counts
    before, _counts = _counts, Counts()
    about = SimpleNamespace(name="pretend", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: about,
        "get_device_name": lambda device=None: about.name,
        "get_device_capability": lambda device=None: (about.major, about.minor),
        "mem_get_info": lambda device=None: (about.total_memory, about.total_memory),
        "synchronize": lambda device=None: _counts.add("waits"),
        "_lazy_init": nothing,
        "empty_cache": nothing,
        "set_device": nothing,
    }
    as_it_is: Any = lambda function=None, **options: function if function is not None else lambda f: f  # noqa: E731
    _guard.swap_hooks()
    fakes = [
        mock.patch.multiple(torch.cuda, **cuda, **graphs.fakes(_replayed)),
        mock.patch.multiple(torch, compile=as_it_is, tensor=_tensor, use_deterministic_algorithms=nothing),
        mock.patch.object(torch.backends.cudnn, "is_acceptable", lambda tensor: False),
    ]
    try:
        with ExitStack() as stack:
            for fake in fakes:
                stack.enter_context(fake)
            yield _counts
    finally:
        _guard.swap_hooks()
        _counts = before


def _tensor(data: Any, *, device: Any = None, _make: Any = torch.tensor, **options: Any) -> Tensor:
    """torch.tensor, whose copy to a device is hidden from `__torch_dispatch__`."""
    made: Tensor = _make(data, **options)
    return made if device is None or torch.device(device).type != "cuda" else made.to(device)
