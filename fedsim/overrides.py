"""From a YAML file and dotted overrides (`a.b=value`) to plain dictionaries, with errors of one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsim.config import ConfigError


def read_file(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A YAML file with dotted overrides applied, as plain dictionaries; what refers to an overridden key follows it.

    A bare name (`quickstart`) that is no file is one of the files that come with fedsim.

    Raises:
        ConfigError: if the file is missing or is not YAML.
    """
    path = Path(path)
    if not path.is_file() and path.name == str(path):
        path = shipped().get(path.name, path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        names = [*(p.name for p in folder.glob("*.yaml")), *(shipped() if path.name == str(path) else ())]
        near = difflib.get_close_matches(path.name, names, n=1)
        what = "is a folder" if path.is_dir() else "no such file"
        hint = f"did you mean {str(folder / near[0])!r}?" if near else "name an experiment file (YAML)"
        raise ConfigError(f"{path}: {what}; {hint}")
    with plain_errors(str(path)):
        from omegaconf import OmegaConf

        loaded = OmegaConf.load(path)
    return apply_overrides(loaded, overrides or {}, str(path))


def shipped() -> dict[str, Path]:
    """{name: path} of the experiment files that come with fedsim."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def parse_overrides(texts: Iterable[str], source: str) -> dict[str, Any]:
    """{dotted key: value} from `key.sub=value` texts; values are YAML.

    Raises:
        ConfigError: for a text without `=`, or whose value is not YAML.
    """
    from omegaconf import OmegaConf

    out: dict[str, Any] = {}
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{source}: override {text!r} has no key and '='; write key.sub=value")
        with plain_errors(f"{source}: override {text!r}", BRACES if ":" in text else ""):
            value = OmegaConf.select(OmegaConf.from_dotlist([text]), key)
        if OmegaConf.is_dict(value) and any(":" in str(k) and v is None for k, v in value.items()):
            raise ConfigError(f"{source}: override {text!r}: not readable{BRACES}")
        out[key] = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
    return out


def apply_overrides(raw: Any, overrides: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Plain dictionaries from a mapping, or YAML as text, and dotted overrides.

    A value with a name of its own (`strategy=fedavg`, `strategy={name: fedfix, interval: 3}`) replaces the entry that
    was there, since fields of one entry mean nothing to another; other sections are merged.

    Raises:
        ConfigError: if a key leads into a value that is no section, or the text is not YAML.
    """
    from omegaconf import OmegaConf

    with plain_errors(source):
        config = raw if OmegaConf.is_config(raw) else OmegaConf.create(raw if isinstance(raw, str) else dict(raw))
        if not OmegaConf.is_dict(config):
            raise ConfigError(f"{source}: expected sections at the top, got a list or text")
        for key, value in overrides.items():
            _open_entry(config, key)
            named = isinstance(value, Mapping) and "name" in value
            OmegaConf.update(config, key, value, merge=not named, force_add=True)
        plain = OmegaConf.to_container(config, resolve=True)
    return {str(k): v for k, v in plain.items()}


BRACES = "; in braces, put a space after each ':' and quote the whole, as in 'strategy={name: fedavg, cohort_size: 5}'"


@contextmanager
def plain_errors(source: str, hint: str = "") -> Iterator[None]:
    """The YAML and merging libraries' errors as one line."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as e:
        raise ConfigError(f"{source}: not readable: {' '.join(str(e).split())}{hint}") from e


def _open_entry(config: Any, key: str) -> None:
    """Turn an entry written as a bare name into {name: ...} when an override goes below it."""
    from omegaconf import OmegaConf

    parts = key.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        value = OmegaConf.select(config, parent)
        if isinstance(value, str):
            OmegaConf.update(config, parent, {"name": value}, merge=False)
