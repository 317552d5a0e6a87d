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
from pathlib import Path

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")


@cache
def library(source: str) -> ctypes.CDLL | None:
    """The compiled source, from the user's cache if it is there; None if this machine cannot compile it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
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
