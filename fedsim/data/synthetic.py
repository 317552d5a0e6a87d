"""Drawn data sets of any size, for tests, benchmarks and controlled heterogeneity.

Letters: n samples, d features, K classes, N clients.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch

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
