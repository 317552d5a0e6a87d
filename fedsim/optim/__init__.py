"""The shared optimizer core: one rule for every simulated client, every deployed client and the server.

How to read it: `core.py` is what callers see, `pipeline.py` is the order of a step, `rule.py` says what a rule is, and
the rules are short formulas in `elementwise.py`, `adaptive.py` and the files beside them. `table.py` names them all.

How to add a rule:
1. Write a frozen keyword-only dataclass deriving from `Rule` in the file of its class. Its fields are the
   hyper-parameters (`Hyper` where each client may have its own), checked in `__post_init__`. Declare `states`
   (`State(name, per, init)`), `decay` (the source's mode), `default_lr`, and where they differ from the base
   `elementwise = False` (a coordinate sees others: `seg` gives sums and norms per tensor or row), `owns_lr`, `roles`,
   `needs`, `inputs`, `host`.
2. `coefficients(h, t, q)`: everything that depends on t and the hyper-parameters, as plain arithmetic.
3. `direction(x, g, s, c, seg)`: update `s.m` and its like in place with operators that broadcast (`mul_`, `add_`,
   `lerp_`), and return u for x -= lr * u. Do not write to x or g.
4. A rule on whole matrices takes them by `matrix.groups_of(seg)`, all of one shape at once, and gives the sizes of its
   states by `sized_states`; where the host decides what a step does (a refresh every so often), `compiles = False`. A
   state called v, v_max, a or n is never negative, which 8-bit storage relies on. What a rule needs beside the gradient
   is one method of `fedsim.task.Oracle` and one line of `needs.supply`.
5. One row in `table.RULES`, and one test against an independent oracle in tests/fedsim/optim. The contract suite
   (tests/contracts/test_optimizers.py) runs over the table, so the new rule is in it already.
"""

from fedsim.optim.core import Optimizer, build
from fedsim.optim.state import OptState
from fedsim.optim.torch_adapter import torch_optimizer

__all__ = ["OptState", "Optimizer", "build", "torch_optimizer"]
