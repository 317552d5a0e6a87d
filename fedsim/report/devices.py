"""The devices of a deployment, one by one: how their jobs ended, how long they took, what they logged last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsim.report.files import reading
from fedsim.report.page import Section, Table

SHOWN = 200


def devices_section(folder: Path) -> Section | None:
    """The section, or None of a run without real devices; those with the most lost jobs first."""
    file = folder / "devices.jsonl"
    if not file.is_file():
        return None
    with reading(file):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows.sort(key=lambda row: -(row["dropped"] + row["failed"] + row["refused"]))
        keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "nonfinite"]
        cells = [[_shown(row.get(key)) for key in keys] for row in rows[:SHOWN]]
    many = f"{SHOWN} of {len(rows):,} devices" if len(rows) > SHOWN else f"{len(rows):,} devices"
    text = "Jobs of each client's device by how they ended, seconds from sending to reply, and what it logged last."
    return Section(
        title="Devices", text=text, table=Table(header=[k.replace("_", " ") for k in keys], rows=cells, fold=many)
    )


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
