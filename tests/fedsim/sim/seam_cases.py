"""Client halves that break the rules of the seam, and some that only look as if; workers import them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.clients.local_training import LocalTraining
from fedsim.cohort import Cohort
from fedsim.compress.sparsify import Identity
from fedsim.graph import Inbox
from fedsim.terms import Terms


@dataclass(frozen=True, kw_only=True)
class Keepers:
    """Halves that reply and keep what is somebody else's storage: each client's row is what its name says."""

    local: LocalTraining | None = None

    def trained(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        assert self.local is not None
        delta = self.local(clients, x).delta
        clients.memory["last"] = delta
        return {"v": delta}

    def model(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        clients.memory["last"] = x.expand(len(clients), -1)
        return {"v": x.expand(len(clients), -1)}

    def scratch(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        v = clients.scratch("mine", x).copy_(_own(clients, x))
        clients.memory["last"] = v
        clients.log(first=v[:, 0])
        return {"v": v}

    def packed(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        v = clients.scratch("mine", x).copy_(_own(clients, x))
        clients.memory["last"] = v
        return {"v": Identity().encode(v, clients.streams)}  # holds the stack itself

    def numpy(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        v = NUMPY.setdefault(len(clients), _own(clients, x).numpy())
        v[:] = _own(clients, x).numpy()
        clients.memory["last"] = torch.from_numpy(v)
        return {"v": torch.from_numpy(v)}

    def remembered(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        v = clients.memory["last"]
        v += _own(clients, x)
        clients.memory["last"], clients.memory["again"] = v, v
        return {"v": v}

    def twice(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        v = _own(clients, x)
        clients.memory["last"] = v
        return {"v": v, "w": v}

    def heard(self, clients: Cohort, inbox: Inbox) -> dict[str, Any]:
        own = inbox.heard.own
        v = inbox["v"][int(own.min()) : int(own.max()) + 1]
        v = v if len(v) == len(clients) and bool((own.diff() == 1).all()) else inbox.own("v")
        clients.memory["last"] = v
        return {"v": v}


NUMPY: dict[int, Any] = {}


def _own(clients: Cohort, x: Tensor) -> Tensor:
    return x * (1 + clients.ids[:, None]).to(x)


class Breakers:
    """Halves that are refused."""

    def one_row(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        return {"delta": x[None]}

    def one_row_of_terms(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        return {"delta": Terms.of(x[None]) - x}

    def no_row(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        return {"delta": Terms.of(x)}

    def integers(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        return {"delta": torch.zeros(len(clients), 2, dtype=torch.int64)}

    def array(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        return {"delta": x.expand(len(clients), -1).numpy()}

    def numbered(self, clients: Cohort, x: Tensor) -> dict[Any, Any]:
        return {3: x.expand(len(clients), -1)}

    def nothing(self, clients: Cohort, x: Tensor) -> None:
        return None

    def uneven(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        return {"delta": torch.ones(len(clients), 2 if 0 in clients.ids.tolist() else 1)}

    def unnamed(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        return {"delta" if 0 in clients.ids.tolist() else "gamma": x.expand(len(clients), -1)}

    def logs_one(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        clients.log(norm=torch.tensor(1.0))
        return {}

    def keeps_one(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        clients.memory["c"] = x[None]
        return {}

    def writes_model(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        x.mul_(0.5)
        return {"delta": x.expand(len(clients), -1).clone()}

    def writes_view(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        x.view(-1)[0] = 7.0
        return {"delta": x.expand(len(clients), -1).clone()}

    def writes_memory(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        clients.memory["c"].add_(1.0)
        return {}

    def writes_numpy(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        x.numpy()[:] = 7.0
        return {}

    def half(self, clients: Cohort, x: Tensor) -> dict[str, Any]:
        return {"v": _own(clients, x)}

    def writes_inbox(self, clients: Cohort, inbox: Inbox) -> dict[str, Any]:
        inbox["v"].zero_()
        return {}


REFUSED = {
    "one_row": r"field 'delta' of its reply has the shape \[1, 2\] and needs one row for each of the 3 clients",
    "one_row_of_terms": r"'delta' of its reply has the shape \[1, 2\] and needs one row for each of the 3",
    "no_row": r"'delta' of its reply has the shape \[2\] and needs one row for each of the 3",
    "integers": r"'delta' of its reply holds vectors of torch.int64; they need a floating dtype",
    "array": r"'delta' of its reply is a ndarray; return a tensor, terms, or a packet",
    "numbered": r"field 3 of its reply is named by a int; name it by text",
    "nothing": r"it returned a NoneType; return \{name: tensor\}, or \{\} for nothing",
    "logs_one": r"metric 'norm' needs one number for each client, \[3\], got \[\]",
    "keeps_one": r"memory\['c'\] needs one row per client \(3\), got \[1, 2\]",
    "writes_model": r"wrote to the x that it received, in place; let it write to a copy \(y = x.clone\(\)\)",
    "writes_view": r"wrote to the x that it received, in place",
    "writes_memory": r"memory\['c'\] was changed in place, which keeps nothing; assign the new rows to it",
}
"""{half: what is said of it}."""
