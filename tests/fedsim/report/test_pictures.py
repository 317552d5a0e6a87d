"""The report's pictures of a final model."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from fedsim.report.draw import images
from fedsim.report.pictures import pictures_section
from fedsim.report.split import split_section
from fedsim.report.topology import topology_section
from fedsim.tasks.pictures import grid


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_read_by_others_as_it_was(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, channels), dtype=np.uint8)
    drawn = re.search(r"base64,([^\"]+)", images(pixels, alt="noise"))
    assert drawn is not None
    sheet = matplotlib.image.imread(io.BytesIO(base64.b64decode(drawn[1])), format="png")
    assert sheet.shape[:2] == (2 * 4 + 1, 3 * 5 + 2)  # and a gap of one between images
    for i, j in np.ndindex(2, 3):
        found = sheet[i * 5 : i * 5 + 4, j * 6 : j * 6 + 5]
        assert (found[..., -1] == 1).all()
        np.testing.assert_allclose(255 * found[..., :channels], pixels[i, j], atol=0.01)


def test_samples_become_images_only_where_they_are_some() -> None:
    grey = grid("grey", torch.arange(12.0).view(3, 2, 2), 2, 0.0, 10.0)
    assert grey["grey"][:, :, :, 0, 0].tolist() == [
        [[0.0, pytest.approx(0.2)], [pytest.approx(0.4), pytest.approx(0.6)]]
    ]
    assert grid("colours", torch.zeros(4, 3, 2, 5), 4, 0.0, 1.0)["colours"].shape == (1, 4, 2, 5, 3)
    assert grid("none", torch.zeros(4, 7), 2, 0.0, 1.0) == grid("none", torch.zeros(4, 2, 3, 3), 2, 0.0, 1.0) == {}


@pytest.mark.parametrize("section", [pictures_section, split_section, topology_section])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"something else"])
def test_a_file_of_arrays_that_is_damaged_is_one_message(section: Any, content: bytes, tmp_path: Path) -> None:
    assert section(tmp_path) is None, "no file, no section"
    for name in ("pictures", "split", "topology"):
        (tmp_path / f"{name}.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.npz cannot be read \(.*\); remove it to write the report without it"):
        section(tmp_path)
