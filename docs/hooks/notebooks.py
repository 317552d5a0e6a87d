"""Notebooks as Markdown pages: text, code, and what the code printed and drew."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """(Markdown, {file name: picture}) of a notebook."""
    pictures: dict[str, bytes] = {}
    parts = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += _outputs(cell["outputs"], f"{path.stem}-{number}", pictures)
    parts.append(f"The notebook itself: `docs/notebooks/{path.name}`.")
    return "\n\n".join(parts) + "\n", pictures


def _outputs(outputs: list[dict[str, Any]], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """Printed text and values as blocks, pictures as files beside the page."""
    for number, output in enumerate(outputs):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{number}.png"
            pictures[name] = b64decode("".join(data["image/png"]))
            yield f"![What the code above draws]({name})"
        elif "text/html" in data:
            yield "".join(data["text/html"])
        else:
            text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            yield f"```text\n{text}\n```"
