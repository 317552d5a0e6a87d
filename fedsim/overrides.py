"""From a YAML file and dotted overrides (`a.b=value`) to plain dictionaries, with errors of one line."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsim.config import ConfigError, Given, is_code, naming

Name = str | Given
Shared = Callable[[str, Name, Name], Collection[str] | None]
"""(key of a section, the entry that stands there, another one) -> fields that mean the same in both; None if nobody
expects that of such entries."""


def nothing_shared(key: str, before: Name, after: Name) -> None:
    """Where nobody knows the entries."""


def read_file(
    path: str | Path, overrides: Mapping[str, Any] | None = None, shared: Shared = nothing_shared
) -> dict[str, Any]:
    """A YAML file with dotted overrides applied, as plain dictionaries; what refers to an overridden key follows it.

    Arguments as of `apply_overrides`. A bare name (`quickstart`) that is no file is one of those that come with fedsim.

    Raises:
        ConfigError: if the file is missing or is not YAML.
    """
    path = Path(path)
    if not path.is_file() and path.name == str(path):
        path = shipped().get(path.name, path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        names = {p.name: str(p) for p in folder.glob("*.yaml") if p.is_file()}
        if path.name == str(path) and not path.is_dir():
            names |= {name: name for name in shipped()}
        near = difflib.get_close_matches(path.name, names, n=1)
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "no such file"
        hint = f"did you mean {names[near[0]]!r}?" if near else "name an experiment file (YAML)"
        raise ConfigError(f"{path}: {what}; {hint}")
    with plain_errors(str(path)):
        from omegaconf import OmegaConf

        loaded = OmegaConf.load(path)
    return apply_overrides(loaded, overrides or {}, str(path), shared)


def shipped() -> dict[str, Path]:
    """{name: path} of the experiment files that come with fedsim."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


_KEY = re.compile(r"[^][]+(\[[^][]+\][^][]*)*")  # an index of a list stands in brackets behind its key


def parse_overrides(texts: Iterable[str], source: str) -> dict[str, Any]:
    """{dotted key: value} from `key.sub=value` texts; values are YAML.

    Raises:
        ConfigError: for a text without `=`, or whose value is not YAML.
    """
    from omegaconf import OmegaConf

    out: dict[str, Any] = {}
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise ConfigError(f"{source}: override {text!r} has no key and '='; write key.sub=value")
        with plain_errors(f"{source}: override {text!r}", BRACES if ":" in text else ""):
            value = OmegaConf.select(OmegaConf.from_dotlist([text]), key)
        if OmegaConf.is_dict(value) and any(":" in str(k) and v is None for k, v in value.items()):
            raise ConfigError(f"{source}: override {text!r}: not readable{BRACES}")
        out[key] = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
    return out


def apply_overrides(
    raw: Any, overrides: Mapping[str, Any], source: str, shared: Shared = nothing_shared
) -> dict[str, Any]:
    """Plain dictionaries from a mapping, or YAML as text, and dotted overrides.

    An entry written whole (`strategy={name: fedfix, interval: 3}`) replaces the one that was there, since fields of one
    entry mean nothing to another. One that is only named (`strategy=scaffold`) keeps the fields that both share, and a
    warning says which it drops. Other sections are merged.

    Args:
        raw: a mapping, or YAML as text. In a mapping a function or a class may stand where its name may.
        overrides: {dotted key: value}; an entry's fields are set after the entry, whichever stands first.
        source: the file's name, for messages.
        shared: knows which fields two entries share.

    Raises:
        ConfigError: if a key leads into a value that is no section, or the text is not YAML.
    """
    from omegaconf import OmegaConf

    with plain_errors(source):
        content = raw if OmegaConf.is_config(raw) or isinstance(raw, str) else dict(raw)
        config = OmegaConf.create(content, flags={"allow_objects": True})
        if not OmegaConf.is_dict(config):
            raise ConfigError(f"{source}: expected sections at the top, got a list or text")
        for key, value in sorted(overrides.items(), key=lambda each: each[0].count(".")):  # an entry before its fields
            _open_entry(config, key)
            if is_code(value):
                value = Given.factory(value)
            if isinstance(value, Name):
                value = _renamed(config, key, value, overrides, shared)
            named = isinstance(value, Mapping) and "name" in value
            OmegaConf.update(config, key, value, merge=not named, force_add=True)
        plain = OmegaConf.to_container(config, resolve=True)
    with naming(source):
        _check_values(plain, "")
    return {str(k): v for k, v in plain.items()}


def _check_values(value: Any, key: str) -> None:
    """Refuse what no file can hold and no name could stand for."""
    if isinstance(value, Mapping | list):
        for name, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_values(each, f"{key}[{name}]" if isinstance(value, list) else f"{key}.{name}" if key else str(name))
    elif not (isinstance(value, bool | int | float | str | bytes | Path | Given | None) or is_code(value)):
        raise ConfigError(
            f"{key}: a {type(value).__name__} can't stand here; give a number, text, a list or a section, a function "
            "or class where its name may stand, and modules, data and strategies by model=, data= and strategy="
        )


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
    except RecursionError as e:
        raise ConfigError(f"{source}: not readable: sections are nested too deeply") from e


def _renamed(config: Any, key: str, name: Name, overrides: Mapping[str, Any], shared: Shared) -> Any:
    """The entry of this name, with what it keeps of the one that stands at the key; the name alone if none does.

    Fields without a name are those of a function or class given from Python.
    """
    from omegaconf import OmegaConf

    before = OmegaConf.select(config, key)
    if not OmegaConf.is_dict(before):
        return name
    fields = dict(OmegaConf.to_container(before, resolve=False))
    old = fields.pop("name", None)
    if not isinstance(old, Name):
        return name if isinstance(name, str) else {**fields, "name": name}
    keeps = fields if old == name else shared(key, old, name)
    if keeps is None:
        return {"name": name}
    lost = [
        f"{k}: {v}" for k, v in fields.items() if k not in keeps and v is not None and f"{key}.{k}" not in overrides
    ]
    if lost:
        whole = f"{key}={{name: {name}, ...}}"
        warnings.warn(f"{key}={name} drops {', '.join(lost)} of {old}; write {whole} to replace it whole", stacklevel=3)
    return {"name": name, **{k: v for k, v in fields.items() if k in keeps}}


def _open_entry(config: Any, key: str) -> None:
    """Turn an entry written as a bare name into {name: ...} when an override goes below it."""
    from omegaconf import OmegaConf

    parts = key.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        value = OmegaConf.select(config, parent)
        if isinstance(value, Name) or is_code(value):
            OmegaConf.update(config, parent, {"name": value}, merge=False)
