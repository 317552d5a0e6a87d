"""What a run's final model is or makes, as images that its task chose."""

from __future__ import annotations

from pathlib import Path

from fedsim.report.draw import images
from fedsim.report.files import arrays, reading
from fedsim.report.page import Picture, Section


def pictures_section(folder: Path) -> Section | None:
    """The section from `pictures.npz` ({title: [rows, columns, height, width, 1 or 3] uint8}), or None without it.

    Raises:
        ValueError: if the file is there and does not hold that.
    """
    file = folder / "pictures.npz"
    if not file.is_file():
        return None
    with reading(file):
        pictures = [Picture(title=title, svg=images(found, alt=title)) for title, found in arrays(file).items()]
    return Section(title="The final model", pictures=pictures)
