"""The names that `import fedsim` offers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedsim

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", fedsim.__all__)
def test_a_public_name_means_the_same_every_time_it_is_asked_for(name: str) -> None:
    first = getattr(fedsim, name)
    assert getattr(fedsim, name) is first
    assert find_spec(f"fedsim.{name}") is None, "a module of that name would take its place once it is imported"


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedsim' has no attribute 'rnu'"):
        fedsim.rnu  # noqa: B018


def test_importing_the_package_loads_none_of_its_rooms() -> None:
    code = "import fedsim, sys; print(*sorted(m for m in sys.modules if m == 'torch' or m.startswith('fedsim')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["fedsim"]


def test_a_users_own_folders_called_strategies_and_clients_do_not_stand_in_the_way(tmp_path: Path) -> None:
    for name in ("strategies", "clients"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    code = f"import sys; sys.path.insert(1, {str(ROOT)!r}); from fedsim.compose import TABLES; print(*TABLES)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "strategies" in out.split()


def test_what_the_wheel_is_to_carry_beside_code_lies_in_the_package() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fedsim"]
    carried = {p.resolve() for pattern in patterns for p in (ROOT / "fedsim").glob(pattern)}
    assert {*(ROOT / "configs").glob("*.yaml"), ROOT / "data" / "tinyshakespeare.txt.gz"} <= carried
    assert all((ROOT / "fedsim" / pattern.partition("/")[0]).exists() for pattern in patterns)
