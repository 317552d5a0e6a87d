"""Control variates of SCAFFOLD and its kin: what a client reports of c_i, and how the server's c follows.

Letters: C clients of a stack, R replies, N clients, P parameters; c_i a client's control variate, c the server's.
"""

from __future__ import annotations

from torch import Tensor

from fedsim.fleet import Aggregator, Exact, Replies, linear
from fedsim.strategies.server import Synchronous
from fedsim.terms import Terms


def report(strategy: Synchronous, new: Tensor, old: Tensor) -> Exact:
    """[C, P]: the change of c_i, whose means add up to the mean of all c_i; for a robust rule c_i itself.

    Robust values of changes do not add up to one of the c_i: c would drift off, and with it the solution.
    """
    return Exact(Terms.of(new) - old if strategy.folds else new)


def followed(c: Tensor, replies: Replies, rule: Aggregator, num_clients: int) -> Tensor:
    """c [P] after a round; 1/N, not 1/S: it is about all clients. Of a robust rule it is a moving average."""
    share, reported = len(replies) / num_clients, replies.mean("c", rule)
    return c + share * reported if linear(rule) is not None else (1 - share) * c + share * reported
