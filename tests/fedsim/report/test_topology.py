"""The report's picture of who hears whom."""

import re

import numpy as np
import pytest

from fedsim.report.topology import topology_section
from fedsim.runs import run
from tests.composition import pair


@pytest.mark.pictures
def test_a_run_of_peers_shows_its_graph_and_gap(tmp_path):
    raw = pair("dsgd", None)
    run({**raw, "rounds": 1, "strategy": {"name": "dsgd", "topology": "ring"}}, out=tmp_path / "run")
    section = topology_section(tmp_path / "run")
    assert section is not None
    assert section.text.startswith("8 peers, each with 2 neighbours. The spectral gap is 0.195:")  # (2 - sqrt 2) / 3
    (picture,) = section.pictures
    assert "nan" not in picture.svg.lower() and re.search(r"Topology", (tmp_path / "run" / "report.html").read_text())


def test_a_graph_that_changes_and_falls_apart_for_a_step_is_drawn_as_it_begins(tmp_path):
    pairs = np.array([[0, 1, 1, 2], [1, 0, 2, 1]])
    np.savez(tmp_path / "topology.npz", n=4, pairs=pairs, gap=0.25, steps=10)
    section = topology_section(tmp_path)
    assert section.text.startswith("4 peers, each with 0 to 2 neighbours. The spectral gap is 0.25 a step, over 10")
    assert [p.title for p in section.pictures] == ["Who hears whom in the first step", "Peers by neighbours"]


def test_no_file_no_section_and_a_broken_one_is_named(tmp_path):
    assert topology_section(tmp_path) is None
    (tmp_path / "topology.npz").write_bytes(b"broken")
    with pytest.raises(ValueError, match="topology.npz cannot be read .*; remove it to write the report without it"):
        topology_section(tmp_path)


def test_many_peers_have_no_picture(tmp_path):
    i = np.arange(500)
    np.savez(tmp_path / "topology.npz", n=500, pairs=np.stack([i, (i + 1) % 500]), gap=np.nan, steps=1)
    section = topology_section(tmp_path)
    assert not section.pictures and section.text == "500 peers, each with 1 neighbours. "
