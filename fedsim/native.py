"""C++ of ours, compiled by the machine's own compiler when it is first wanted, and kept in the user's cache.

Compiled code is called through ctypes, which takes a few microseconds and leaves the GIL free meanwhile. A machine
without a compiler gets None, and its caller does the same work with torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from math import factorial
from pathlib import Path

import torch

TYPES = {torch.float32: ("float", "int32_t"), torch.float64: ("double", "int64_t")}  # `real`, and an integer as wide
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")

# What every source begins with. `exponential` is Cephes' expf, or exp, arranged so that a compiler can take many at a
# time: e^a = 2^n e^r with abs(r) <= ln(2) / 2 and e^r from its series; relative error below 2e-7 (2e-16).
_PRELUDE = """\
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef REAL real;
typedef WORD word __attribute__((may_alias));  // a number's own bits, looked at in place

static inline real exponential(real a) {
    const real top = sizeof(real) == 4 ? real(88) : real(708);
    a = a > top ? top : (a < -top ? -top : a);
    const real n = floor(a * real(1.4426950408889634) + real(0.5));
    const real r = (a - n * real(0.693145751953125)) - n * real(1.42860682030941723212e-6);
    static const real series[] = {SERIES};  // 1 / i!
    const int terms = sizeof(real) == 4 ? 7 : 13;
    real sum = series[terms];
#pragma GCC unroll 16
    for (int i = terms - 1; i >= 0; --i) sum = sum * r + series[i];
    const word bits = ((word)n + (sizeof(real) == 4 ? 127 : 1023)) << (sizeof(real) == 4 ? 23 : 52);
    real scale;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}
""".replace("SERIES", ", ".join(f"1. / {factorial(i)}" for i in range(14)))


@cache
def library(source: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled source, from the user's cache if it is there; None if this machine cannot compile it.

    Args:
        source: C++ that speaks of `real`, `word` and `exponential`.
        dtype: one of `TYPES`, what `real` is.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    real, word = TYPES[dtype]
    source = _PRELUDE.replace("REAL", real).replace("WORD", word) + source
    key = hashlib.sha256("\n".join([source, compiler, *_FLAGS, _processor()]).encode()).hexdigest()[:24]
    path = _folder() / f"{key}.so"
    if not path.exists() and not _compile(compiler, source, path):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compile(compiler: str, source: str, path: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        (Path(folder) / "source.cpp").write_text(source)
        base = [compiler, *_FLAGS, "-shared", "-fPIC", "-o", f"{folder}/compiled.so", f"{folder}/source.cpp"]
        for extra in (["-fopenmp"], []):
            if subprocess.run([*base, *extra], capture_output=True).returncode == 0:
                os.replace(f"{folder}/compiled.so", path)  # whole or not at all, whoever else is writing it
                return True
    return False


@cache
def _folder() -> Path:
    """The user's cache of compiled code; where none can be written, a folder of this process."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsim" / "native"
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fedsim-native-"))


@cache
def _processor() -> str:
    """What compiled code depends on: a cache may be shared by machines."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.platform() + platform.processor()
    lines = info.read_text().splitlines()
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return platform.platform() + "".join(sorted(kept))
