"""An elementwise step as C++: the operations of one recorded step, in one loop over coordinates.

The step is recorded once, on a tiny stack, as a list of torch operations. No coordinate sees another one, so each
operation is one line of arithmetic on numbers: a tensor is a local variable, an operation in place assigns to it, and
what was assigned is stored at the end. Every array is read once and written once.

A client's gradient is looked through for numbers that are not finite just before its step, so that what it fetches is
near when the step needs it. Where a step writes to x alone, and the stack is too large for the cache but a row is not,
the look is part of the step: meanwhile the old x goes to a log, which all rows use in turn, and a row whose gradient
turns out bad is put back from there.

Letters: k clients (rows), P coordinates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx


class NotElementwise(Exception):
    """The step holds an operation that has no line of arithmetic here."""


def record(step: Callable[..., None], sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> fx.Graph:
    """The operations of a step on tensors of these sizes, for example (2, 3) for an array and (2, 1) for a number."""
    tensors = [torch.full(size, 0.5, dtype=dtype) for size in sizes]
    graph: fx.Graph = make_fx(step)(*tensors).graph
    return graph


def source(
    graph: fx.Graph, arrays: Sequence[str], weights: Sequence[str], coefficients: Sequence[str], gradient: int
) -> str:
    """C++ of a recorded step, for `native.library`.

    Args:
        graph: from `record`.
        arrays: names of the [k, P] and [1, P] inputs, in the order of the graph's inputs.
        weights: names of the [1, P] inputs that follow, each one number over a run of coordinates.
        coefficients: names of the [k, 1] inputs, which follow those.
        gradient: which array is the gradient.
    """
    names = [f"a{i}_{n}" for i, n in enumerate(arrays)]
    shared = [f"w{i}_{n}" for i, n in enumerate(weights)]
    factors = [f"c{i}_{n}" for i, n in enumerate(coefficients)]
    lines, stored, used = _body(graph, names, [*shared, *factors])
    read = [n for n in names if n in used or n in stored]
    loads = [f"real {n} = p_{n}[j];" for n in read]
    stores = [f"p_{n}[j] = {n};" for n in names if n in stored]
    pointers = [f"{'' if n in stored else 'const '}real* __restrict p_{n}" for n in read]
    scalars = [f"const real {n}" for n in [*shared, *factors] if n in used]
    given = [
        f"({'' if n in stored else 'const '}real*)s.array[{i}] + r * s.stride[{i}] + from" for i, n in enumerate(names)
    ]
    passed = [given[i] for i, n in enumerate(names) if n in read]
    passed += [f"(real)s.weight[{i} * s.runs + run]" for i, n in enumerate(shared) if n in used]
    passed += [f"(real)s.coef[{i} * s.across + r * s.down]" for i, n in enumerate(factors) if n in used]
    return _FRAME.format(
        parameters=",\n    ".join([*pointers, *scalars]),
        loads="\n        ".join(loads),
        body="\n        ".join([*lines, *stores]),
        first=names[0],
        arguments=",\n        ".join(passed),
        gradient=gradient,
        gradient_name=names[gradient],
        logs=int(stored == {names[0]} and names[gradient] in read),
        ways=4 if len(read) <= 2 else 2 if len(read) <= 4 else 1,
    )


def _body(graph: fx.Graph, arrays: list[str], numbers: list[str]) -> tuple[list[str], set[str], set[str]]:
    """Lines of the loop, the arrays that are written, and all inputs that are read."""
    given = iter([*arrays, *numbers])
    cell: dict[fx.Node, str] = {}
    lines: list[str] = []
    stored: set[str] = set()
    used: set[str] = set()

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            used.add(cell[value])
            return cell[value]
        return _number(value)

    for node in graph.nodes:
        if node.op == "placeholder":
            cell[node] = next(given)
            continue
        if node.op == "output":
            break
        if node.op != "call_function" or node.target is operator.getitem:
            raise NotElementwise(str(node))
        name, args = _name(node), list(node.args)
        if name in _SAME:
            cell[node] = cell[args[0]]
            continue
        target = node.kwargs.get("out") or (args[0] if name.endswith("_") else None)
        name = name.rstrip("_")
        if name not in _OPERATIONS:
            raise NotElementwise(name)
        kwargs = {n: text(v) for n, v in node.kwargs.items() if n in ("alpha", "value")}
        expression = _OPERATIONS[name](*(text(a) for a in args), **kwargs)
        if target is None:
            cell[node] = f"v{len(lines)}"
            lines.append(f"const auto {cell[node]} = {expression};")
            continue
        cell[node] = cell[target]
        if cell[target] in arrays:
            stored.add(cell[target])
        elif not cell[target].startswith("v"):
            raise NotElementwise(f"{name} writes to a coefficient")
        lines.append(f"{cell[target]} = {expression};")
    written = {line.split(" = ")[0] for line in lines}
    lines = [_declare(line, written) for line in lines]
    return lines, stored, used


def _declare(line: str, written: set[str]) -> str:
    """A variable that is assigned to later is not const."""
    kind, _, rest = line.partition("const auto ")
    return f"auto {rest}" if not kind and rest.split(" = ")[0] in written else line


def _name(node: fx.Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise NotElementwise(str(target))
    return target.overloadpacket.__name__


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotElementwise(f"a constant {value!r}")
    number = float(value)
    if number != number:
        return "real(NAN)"
    if number in (float("inf"), float("-inf")):
        return "real(INFINITY)" if number > 0 else "real(-INFINITY)"
    return f"real({number!r})"


def _power(a: str, exponent: str) -> str:
    known = {"real(2.0)": f"({a} * {a})", "real(0.5)": f"sqrt({a})", "real(1.0)": a, "real(-0.5)": f"(1 / sqrt({a}))"}
    if exponent not in known:
        raise NotElementwise(f"a power of {exponent}")
    return known[exponent]


def _clamp(a: str, low: str = "", high: str = "") -> str:
    a = f"({a} < {low} ? {low} : {a})" if low else a
    return f"({a} > {high} ? {high} : {a})" if high else a


_SAME = {"alias", "detach", "expand", "view", "_unsafe_view", "unsqueeze", "lift_fresh"}
_OPERATIONS: dict[str, Callable[..., str]] = {
    "abs": lambda a: f"fabs({a})",
    "add": lambda a, b, alpha="": f"{a} + {alpha + ' * ' if alpha else ''}{b}",
    "addcdiv": lambda a, b, c, value="real(1)": f"{a} + {value} * ({b} / {c})",
    "addcmul": lambda a, b, c, value="real(1)": f"{a} + {value} * ({b} * {c})",
    "clamp": _clamp,
    "clamp_max": lambda a, high: _clamp(a, high=high),
    "clamp_min": lambda a, low: _clamp(a, low=low),
    "clone": lambda a: a,
    "copy": lambda a, b: b,
    "div": lambda a, b: f"{a} / {b}",
    "eq": lambda a, b: f"{a} == {b}",
    "exp": lambda a: f"exponential({a})",
    "expm1": lambda a: f"expm1({a})",
    "ge": lambda a, b: f"{a} >= {b}",
    "gt": lambda a, b: f"{a} > {b}",
    "le": lambda a, b: f"{a} <= {b}",
    "lerp": lambda a, b, w: f"lerp({a}, {b}, {w})",
    "lt": lambda a, b: f"{a} < {b}",
    "masked_fill": lambda a, m, value: f"{m} ? {value} : {a}",
    "maximum": lambda a, b: f"{a} > {b} ? {a} : {b}",
    "minimum": lambda a, b: f"{a} < {b} ? {a} : {b}",
    "mul": lambda a, b: f"{a} * {b}",
    "ne": lambda a, b: f"{a} != {b}",
    "neg": lambda a: f"-{a}",
    "pow": _power,
    "reciprocal": lambda a: f"1 / {a}",
    "rsqrt": lambda a: f"1 / sqrt({a})",
    "rsub": lambda a, b, alpha="": f"{b} - {alpha + ' * ' if alpha else ''}{a}",
    "sigmoid": lambda a: f"1 / (1 + exponential(-{a}))",
    "sign": lambda a: f"sign({a})",
    "sqrt": lambda a: f"sqrt({a})",
    "square": lambda a: f"{a} * {a}",
    "sub": lambda a, b, alpha="": f"{a} - {alpha + ' * ' if alpha else ''}{b}",
    "where": lambda m, a, b: f"{m} ? {a} : {b}",
}

# `lerp` is torch's: exact at both ends.
_FRAME = """\
#include <vector>
#define NONFINITE (sizeof(real) == 4 ? (word)0x7f800000 : (word)0x7ff0000000000000)
#define PART 16384  // coordinates that one thread takes at a time
// Memory answers several streams faster than one, up to about ten: a look goes through a gradient in four places at
// once (backwards: the step finds what was seen last in the nearest cache), and long rows, which lie out of the cache,
// are stepped in several places by turns. A piece is no power of two, so that the places do not fall on the same lines
// of the cache.
#define WAYS {ways}
#define PIECE 240
#define PIECE_LOGGED 144
#define LONG (1 << 16)
#define LOGS {logs}
#define NEAR (1 << 22)  // coordinates of a stack that the cache which cores share may hold: there two looks are cheap
#define LONGEST_LOG (1 << 21)  // of a row whose old x stays in that cache

static inline real lerp(real a, real b, real w) {{
    const bool low = fabs(w) < real(0.5);
    return (low ? a : b) + (low ? w : w - 1) * (b - a);
}}

static inline real sign(real a) {{ return real(a > 0) - real(a < 0); }}

static inline word worse(word bits, word worst) {{ return (bits & NONFINITE) > worst ? bits & NONFINITE : worst; }}

static bool unsound(const word* __restrict bits, long n) {{
    const long part = n / 4;
    word a = 0, b = 0, c = 0, d = 0;
    for (long j = part - 1; j >= 0; --j) {{
        a = worse(bits[j], a);
        b = worse(bits[j + part], b);
        c = worse(bits[j + 2 * part], c);
        d = worse(bits[j + 3 * part], d);
    }}
    for (long j = 4 * part; j < n; ++j) a = worse(bits[j], a);
    return a == NONFINITE || b == NONFINITE || c == NONFINITE || d == NONFINITE;
}}

// Returns what tells whether some gradient was not finite, if it keeps a log of x.
template <bool logged>
static inline word part(const long n, real* __restrict log,
    {parameters}) {{
    word worst = 0;
#pragma GCC ivdep
    for (long j = 0; j < n; ++j) {{
        {loads}
        if (logged) {{
            word bits;
            memcpy(&bits, &{gradient_name}, sizeof bits);
            worst = worse(bits, worst);
            log[j] = {first};
        }}
        {body}
    }}
    return worst;
}}

struct Stack {{
    void** array; const long* stride; const double* coef; long across, down;
    long runs; const long* ends; const double* weight;
}};

// Coordinates from, ..., from + n - 1 of row r, all of them in one run.
template <bool logged>
static inline word advance(const Stack& s, long r, long run, long from, long n, real* log) {{
    return part<logged>(n, logged ? log + from : nullptr,
        {arguments});
}}

static inline const word* gradient(const Stack& s, long r, long from) {{
    return (const word*)s.array[{gradient}] + r * s.stride[{gradient}] + from;
}}

template <bool logged>
static word row(const Stack& s, long r, real* log) {{
    const long piece = logged ? PIECE_LOGGED : PIECE;
    word worst = 0;
    for (long run = 0, from = 0; run < s.runs; from = s.ends[run++]) {{
        const long n = s.ends[run] - from;
        const long share = n < LONG || WAYS == 1 ? 0 : n / (WAYS * piece) * piece;
        for (long at = from; at < from + share; at += piece)
            for (long way = 0; way < WAYS; ++way)
                worst = worse(advance<logged>(s, r, run, at + way * share, piece, log), worst);
        worst = worse(advance<logged>(s, r, run, from + WAYS * share, n - WAYS * share, log), worst);
    }}
    return worst;
}}

static long left(const unsigned char* bad, long k) {{
    long rows = 0;
    for (long r = 0; r < k; ++r) rows += bad[r];
    return rows;
}}

// Several threads: each part of a row is looked through, then each part is stepped.
static long by_parts(const Stack& s, long k, long p, unsigned char* bad, int check, int threads) {{
    const long parts = (p + PART - 1) / PART;
    if (check) {{
#pragma omp parallel for num_threads(threads)
        for (long i = 0; i < k * parts; ++i) {{
            const long r = i / parts, from = i % parts * PART;
            if (unsound(gradient(s, r, from), p - from < PART ? p - from : PART)) {{
#pragma omp atomic write
                bad[r] = 1;
            }}
        }}
    }}
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < k * parts; ++i) {{
        const long r = i / parts, to = i % parts * PART + PART < p ? i % parts * PART + PART : p;
        long from = i % parts * PART, run = 0;
        while (s.ends[run] <= from) ++run;
        for (; from < to && !bad[r]; from = s.ends[run++]) {{
            advance<false>(s, r, run, from, (s.ends[run] < to ? s.ends[run] : to) - from, nullptr);
        }}
    }}
    return left(bad, k);
}}

// array[i] + r * stride[i] is row r of an array, coef[i * across + r * down] its coefficient i. Runs of coordinates,
// each up to its end, share weights: weight[i * runs + run]. bad[r], 0 at first, becomes 1 for a row whose gradient is
// not finite, which is left as it is; their number is returned.
extern "C" long step(long k, long p, void** array, const long* stride, const double* coef, long across, long down,
                     long runs, const long* ends, const double* weight, unsigned char* bad, int check, int threads) {{
    const Stack s = {{array, stride, coef, across, down, runs, ends, weight}};
    if (threads > 1) return by_parts(s, k, p, bad, check, threads);
    static thread_local std::vector<real> log;
    const bool logged = LOGS && check && p <= LONGEST_LOG && k * p > NEAR;
    if (logged && log.size() < (size_t)p) log.resize(p);
    for (long r = 0; r < k; ++r) {{
        if (logged) {{
            bad[r] = row<LOGS>(s, r, log.data()) == NONFINITE;
            if (bad[r]) memcpy((real*)array[0] + r * stride[0], log.data(), p * sizeof(real));
        }} else {{
            bad[r] = check && unsound(gradient(s, r, 0), p);
            if (!bad[r]) row<false>(s, r, nullptr);
        }}
    }}
    return left(bad, k);
}}
"""
