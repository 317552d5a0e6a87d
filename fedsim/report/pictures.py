"""What a run's final model is or makes, as images that its task chose."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fedsim.report.draw import images
from fedsim.report.page import Picture, Section


def pictures_section(folder: Path) -> Section | None:
    """The section from `pictures.npz` ({title: [rows, columns, height, width, 1 or 3] uint8}), or None without it.

    Raises:
        ValueError: if the file is there and does not hold that.
    """
    file = folder / "pictures.npz"
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            pictures = [Picture(title=title, svg=images(stored[title], alt=title)) for title in stored.files]
    except (OSError, ValueError, TypeError, BadZipFile) as e:
        raise ValueError(f"{file} cannot be read ({e}); remove it to write the report without it") from e
    return Section(title="The final model", pictures=pictures)
