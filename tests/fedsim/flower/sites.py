"""A data set of which every device has only its own part (the example of docs/deploy.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedsim.data.dataset import Dataset


def load(root: str, sites: tuple[str, ...], site: str | None = None) -> Dataset:
    """One site's samples from `root/<site>.npz`; the server, which is no site, has `root/test.npz` and trains nobody.

    Args:
        root: the folder with this machine's file.
        sites: names of all sites, in the order of their partition-ids.
        site: which one this machine is.
    """
    own = np.load(Path(root) / f"{site or 'test'}.npz")
    x, y = torch.from_numpy(own["x"]), torch.from_numpy(own["y"])
    train, test = (len(x), 0) if site else (1, len(x))  # one row at the server, for the shapes
    return Dataset(
        inputs=x[:train],
        targets=y[:train],
        test_inputs=x[:test],
        test_targets=y[:test],
        num_classes=3,
        groups=torch.full((train,), sites.index(site) if site else 0),
        group_names=sites,
    )


def load_all(root: str, sites: tuple[str, ...]) -> Dataset:
    """All sites' samples in one place, as a simulation has them."""
    parts = [np.load(Path(root) / site / f"{site}.npz") for site in sites]
    held_out = np.load(Path(root) / "server" / "test.npz")
    return Dataset(
        inputs=torch.from_numpy(np.concatenate([part["x"] for part in parts])),
        targets=torch.from_numpy(np.concatenate([part["y"] for part in parts])),
        test_inputs=torch.from_numpy(held_out["x"]),
        test_targets=torch.from_numpy(held_out["y"]),
        num_classes=3,
        groups=torch.repeat_interleave(torch.arange(len(sites)), torch.tensor([len(part["x"]) for part in parts])),
        group_names=sites,
    )
