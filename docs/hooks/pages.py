"""Pages of the site that are made when it is built: the reference of the file, the gallery, notebooks, and the
texts that lie at the top of the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import keys  # noqa: E402
import notebooks  # noqa: E402

from benchmarks.gallery import config as gallery_config  # noqa: E402
from fedsim import _PLACES  # noqa: E402
from fedsim.cli import one_line  # noqa: E402
from fedsim.strategies import STRATEGIES  # noqa: E402

TOP = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the reference's pages and the reproductions to the navigation."""
    parts = {name: pages for item in config.nav or [] for name, pages in item.items()}
    parts["Reference"][:0] = [{title: keys.address(title)} for title in keys.pages()]
    found = sorted((ROOT / "docs" / "reproductions").glob("*.md"))
    parts["Results"][1:1] = [f"reproductions/{path.name}" for path in found]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made: dict[str, str | bytes] = {keys.address(title): text for title, text in keys.pages().items()}
    made["gallery.md"] = gallery()
    made["api/names.md"] = names()
    for source, target in TOP.items():
        made[target] = links((ROOT / source).read_text(encoding="utf-8"))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text, pictures = notebooks.page(path)
        made[f"notebooks/{path.stem}.md"] = text
        made |= {f"notebooks/{name}": picture for name, picture in pictures.items()}
    for address, content in made.items():
        files.append(File.generated(config, address, content=content))
    return files


def links(text: str) -> str:
    """A text from the top of the repository, with links as they are among the site's pages."""
    for source, target in TOP.items():
        text = text.replace(f"]({source})", f"]({target})")
    return re.sub(r"\]\(docs/", "](", text)


def gallery() -> str:
    """One picture a strategy."""
    parts = [
        "# Gallery",
        "One run of every strategy: its own experiment file as it stands, one seed. The pictures show what a run looks "
        "like. The files differ in data, clients and clocks, so they rank nothing; "
        "[first results](first-results.md) compares methods on common ground. "
        "`python -m benchmarks.gallery` makes them.",
    ]
    for name, strategy in STRATEGIES.items():
        file = gallery_config(name)
        parts += [
            f"## {name}",
            f"{one_line(strategy)} `fedsim run {file.stem}`; [its keys](reference/strategies.md#{name}).",
            f"![{name}: the measure over rounds, and over what they cost](gallery/{name}.png)",
        ]
    return "\n\n".join(parts) + "\n"


def names() -> str:
    """What `import fedsim` offers, from the same table that it is loaded by."""
    parts = ["# What `import fedsim` offers", "Each of these is loaded when it is first used."]
    parts += [f"::: {place}.{name}" for name, place in sorted(_PLACES.items(), key=lambda item: item[0].lower())]
    return "\n\n".join(parts) + "\n"
