"""Drawn data sets of any size, for tests, benchmarks and controlled heterogeneity.

Letters: n samples, d features, K classes, N clients.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from fedsim.data.arrays import from_arrays
from fedsim.data.checks import check_fraction, check_least
from fedsim.data.dataset import Dataset
from fedsim.streams import server_rng


def blobs(
    *,
    num_examples: int = 2000,
    num_test: int = 500,
    num_classes: int = 10,
    shape: tuple[int, ...] = (20,),
    spread: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """Gaussian clusters, one per class, of any shape and size; no files.

    Class means are standard normal; a sample is its class's mean plus `spread` times standard normal noise. Classes
    take turns, so their sizes differ by one at most.

    Args:
        num_examples: n.
        num_test: held-out samples from the same clusters.
        num_classes: K.
        shape: of one sample, such as [1, 28, 28].
        spread: standard deviation of the noise.
        seed: the data's own seed; the run's, where the configuration gives none.

    Returns:
        inputs [n, *shape].
    """
    check_least("blobs: ", 1, num_examples=num_examples, num_classes=num_classes)
    check_least("blobs: ", 0, spread=spread, num_test=num_test)
    if not shape or min(shape) < 1:
        raise ValueError(f"blobs: shape must be positive sizes such as [1, 28, 28], got {list(shape)}")
    rng = server_rng(seed, "data.blobs")
    means = rng.standard_normal((num_classes, prod(shape)), dtype=np.float32)
    targets = np.arange(num_examples + num_test) % num_classes
    inputs = rng.standard_normal((len(targets), prod(shape)), dtype=np.float32)
    inputs *= np.float32(spread)
    inputs += means[targets]
    x, y = torch.from_numpy(inputs).view(-1, *shape), torch.from_numpy(targets)
    n = num_examples
    return Dataset(inputs=x[:n], targets=y[:n], test_inputs=x[n:], test_targets=y[n:], num_classes=num_classes).check(
        "blobs"
    )


def marks(
    *,
    num_examples: int = 2000,
    num_test: int = 500,
    num_labels: int = 6,
    size: int = 12,
    present: float = 0.3,
    noise: float = 0.5,
    seed: int = 0,
) -> Dataset:
    """Images with several marks or none, one label for each mark that is there; no files.

    A mark is a small patch of standard normal numbers at a place of its own. An image is the sum of its marks plus
    standard normal noise.

    Args:
        num_examples: n.
        num_test: held-out samples with the same marks.
        num_labels: L, how many marks there are.
        size: an image has size x size pixels.
        present: the share of images that have a mark.
        noise: standard deviation of the noise.
        seed: the data's own seed; the run's, where the configuration gives none.

    Returns:
        inputs [n, 1, size, size], targets [n, L] of 1 and 0.
    """
    check_least("marks: ", 1, num_examples=num_examples, num_labels=num_labels)
    check_least("marks: ", 0, noise=noise, num_test=num_test, present=present)
    check_least("marks: ", 4, size=size)
    rng = server_rng(seed, "data.marks")
    stencils = np.zeros((num_labels, size, size), dtype=np.float32)
    for stencil in stencils:
        i, j = rng.integers(size - 3, size=2)
        stencil[i : i + 4, j : j + 4] = rng.standard_normal((4, 4))
    there = rng.random((num_examples + num_test, num_labels)) < present
    x = np.einsum("nl,lij->nij", there.astype(np.float32), stencils)
    x += np.float32(noise) * rng.standard_normal(x.shape, dtype=np.float32)
    n = num_examples
    return from_arrays(x[:n, None], there[:n].astype(int), x[n:, None], there[n:].astype(int), origin="marks")


def synthetic(
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    num_clients: int = 30,
    num_features: int = 60,
    num_classes: int = 10,
    iid: bool = False,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Synthetic(alpha, beta) of FedProx: a logistic model and an input mean drawn for each client.

    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated Optimization in Heterogeneous Networks. arXiv:1812.06127,
    section 5.1. y = argmax(W_k x + b_k), with W_k, b_k ~ N(u_k, 1), u_k ~ N(0, alpha); x ~ N(v_k, diag(j^-1.2)) with
    v_k ~ N(B_k, 1), B_k ~ N(0, beta). Sizes are 50 plus a lognormal (4, 2). As in the authors' code, alpha and beta
    are standard deviations.

    Args:
        alpha: how far the clients' models differ.
        beta: how far their inputs differ.
        num_clients: N; the natural partition has this many clients.
        num_features: d.
        num_classes: K.
        iid: one model for all and inputs of mean 0, which is the paper's Synthetic-IID.
        test_fraction: the share of each client's samples, the last ones, that is held out (rounded up).
        seed: the data's own seed; the run's, where the configuration gives none.

    Returns:
        inputs [n, d], grouped by client.
    """
    check_least("synthetic: ", 0, alpha=alpha, beta=beta)
    check_least("synthetic: ", 1, num_clients=num_clients, num_features=num_features, num_classes=num_classes)
    check_fraction("synthetic: test_fraction", test_fraction)
    rng = server_rng(seed, "data.synthetic")
    d, sizes = num_features, 50 + rng.lognormal(4, 2, num_clients).astype(np.int64)
    u, big_b = alpha * rng.standard_normal(num_clients), beta * rng.standard_normal(num_clients)
    deviation = np.arange(1, d + 1) ** -0.6  # the root of j^-1.2
    shared = rng.standard_normal((d + 1, num_classes))
    inputs, targets, held = [], [], []
    for k, size in enumerate(sizes.tolist()):
        model = shared if iid else u[k] + rng.standard_normal((d + 1, num_classes))
        v = 0.0 if iid else big_b[k] + rng.standard_normal(d)
        x = v + deviation * rng.standard_normal((size, d))
        inputs.append(x.astype(np.float32))
        targets.append(np.argmax(x @ model[:d] + model[d], axis=1))
        held.append(np.arange(size) >= int((1 - test_fraction) * size))
    x, y = torch.from_numpy(np.concatenate(inputs)), torch.from_numpy(np.concatenate(targets))
    test = torch.from_numpy(np.concatenate(held))
    owner = torch.repeat_interleave(torch.arange(num_clients), torch.from_numpy(sizes))
    return Dataset(
        inputs=x[~test],
        targets=y[~test],
        test_inputs=x[test],
        test_targets=y[test],
        num_classes=num_classes,
        groups=owner[~test],
        group_names=tuple(f"client {k}" for k in range(num_clients)),
    ).check("synthetic")
