"""Who hears whom among peers: the graph, how many neighbours they have, and how fast they agree.

Letters: n peers, E pairs of one who hears and one who is heard.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.report.draw import histogram, network
from fedsim.report.files import arrays, reading
from fedsim.report.page import Picture, Section

SHOWN_PEERS = 200  # of more peers no picture of the graph would show anything


def topology_section(folder: Path) -> Section | None:
    """The section from `topology.npz` (`n`, `pairs` [2, E], `gap`, `steps`), or None if there is none.

    Raises:
        ValueError: if the file is there and does not hold that.
    """
    file = folder / "topology.npz"
    if not file.is_file():
        return None
    with reading(file):
        stored = arrays(file)
        n, pairs, gap, steps = int(stored["n"]), stored["pairs"], float(stored["gap"]), int(stored["steps"])
        degrees = np.bincount(pairs[0], minlength=n)
    pictures = []
    if n <= SHOWN_PEERS:
        title = "Who hears whom in the first step" if steps > 1 else "Who hears whom"
        pictures.append(Picture(title=title, svg=network(_places(n, pairs), pairs, alt="the graph of the peers")))
    if n > 1 and degrees.min() < degrees.max():
        svg = histogram(degrees, x_label="neighbours", alt="number of peers by number of neighbours", whole=True)
        pictures.append(Picture(title="Peers by neighbours", svg=svg))
    return Section(title="Topology", text=_sentence(n, degrees, gap, steps), pictures=pictures)


def _places(n: int, pairs: np.ndarray) -> np.ndarray:
    """[n, 2]: where to draw peers, linked ones close together; begun from a circle, so that nothing is drawn by lot."""
    import networkx as nx

    drawing = nx.Graph()
    drawing.add_nodes_from(range(n))
    drawing.add_edges_from(pairs.T.tolist())
    placed = nx.kamada_kawai_layout(drawing) if nx.is_connected(drawing) else nx.circular_layout(drawing)
    return np.array([placed[i] for i in range(n)], dtype=float).reshape(n, 2)


def _sentence(n: int, degrees: np.ndarray, gap: float, steps: int) -> str:
    few, most = int(degrees.min()), int(degrees.max())
    text = f"{n:,} peers, each with {few:,}{'' if few == most else f' to {most:,}'} neighbours. "
    if np.isfinite(gap):
        over = f" a step, over {steps} of them" if steps > 1 else ""
        text += f"The spectral gap is {gap:.3g}{over}: mixing alone leaves {1 - gap:.3g} of their disagreement at most."
    return text
