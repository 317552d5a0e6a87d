"""The shared optimizer core: one rule for every simulated client, every deployed client and the server.

How to read it, from the top: `core.py` is what callers see; `assemble.py` gathers what a step needs; `backends/` run
it, one of them torch's way and the others by `step.py`, the order of a step written once; `rule.py` says what a rule
is, and the rules are short formulas in `rules/`. `table.py` names them all. `spec.py` decodes a section of the
experiment file into rules and `settings.py`, and `groups.py` lays them over a model's tensors.

How to add a rule:
1. Write a frozen keyword-only dataclass deriving from `Rule` in the file of its family. Its fields are the
   hyper-parameters, with types that say their range (`Beta`, `Share`, `Size` where each client may have its own;
   `Fixed`, `Whole`, `Count`, a `Literal`). Declare `states` (`State(name, per, init)`), `decay` (the source's mode),
   `default_lr`, and where they differ from the base `reach` (what decides u at a coordinate; `seg` gives sums and norms
   per tensor or row), `owns_lr`, `roles`, `needs`, `inputs`, `host`.
2. `coefficients(t, lr, host)`: everything that depends on t and the hyper-parameters, as plain arithmetic on `self`.
3. `direction(x, g, s, c, seg)`: update `s.m` and its like in place with operators that broadcast (`mul_`, `add_`,
   `lerp_`), and return u for x -= lr * u. Do not write to x or g.
4. A rule on whole matrices takes them by `rules.matrix.groups_of(seg)`, all of one shape at once, and gives the sizes
   of its states by `sized_states`. A state called v, v_max, a or n is never negative, which 8-bit storage relies on.
   What a rule needs beside the gradient is one method of `fedsim.task.Oracle` and one line of `needs.supply`.
5. One row in `table.RULES`, and one test against an independent oracle in tests/fedsim/optim. The contract suite
   (tests/contracts/test_optimizers.py) runs over the table, so the new rule is in it already.

How to add a back end: a class with `suits` and `step` in `backends/`, and its place in `backends.BACKENDS`.
"""

from fedsim.optim.core import Optimizer, build
from fedsim.optim.rule import Rule
from fedsim.optim.state import OptState
from fedsim.optim.torch_adapter import torch_optimizer

__all__ = ["OptState", "Optimizer", "Rule", "build", "torch_optimizer"]
