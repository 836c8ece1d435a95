"""Bounds through operators that compute each element from the elements at the same place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import erf, expit

from graphprune.coupling import FLOAT_TYPES
from graphprune.facts.fact import Fact, Floats, coarse, joined, ranked, word
from graphprune.facts.seen import Seen, Table
from graphprune.rules.elementwise import BROADCAST, UNARY

table = Table()
Curve = Callable[[Floats, Seen], Any]

# Operators that never fall where their input rises.
RISING: dict[str, Curve] = {
    "Relu": lambda v, s: np.maximum(v, 0.0),
    "Sigmoid": lambda v, s: expit(v),
    "Tanh": lambda v, s: np.tanh(v),
    "Erf": lambda v, s: erf(v),
    "Exp": lambda v, s: np.exp(v),
    "Softplus": lambda v, s: np.logaddexp(0.0, v),
    "Sqrt": lambda v, s: np.sqrt(np.maximum(v, 0.0)),
    "Atan": lambda v, s: np.arctan(v),
    "Sign": lambda v, s: np.sign(v),
    "Identity": lambda v, s: v,
    "HardSigmoid": lambda v, s: np.clip(s.attr("alpha", 0.2) * v + s.attr("beta", 0.5), 0.0, 1.0),
    "LeakyRelu": lambda v, s: np.where(v < 0, v * s.attr("alpha", 0.01), v),
    "Elu": lambda v, s: np.where(v < 0, s.attr("alpha", 1.0) * np.expm1(np.minimum(v, 0)), v),
}
NEED_ALPHA = ("LeakyRelu", "Elu", "HardSigmoid")  # which rise only where it is not negative
# Operators that dip below zero left of it, no deeper than this, and rise elsewhere.
DEEPEST = -0.4
DIPPING: dict[str, Curve] = {
    "HardSwish": lambda v, s: v * np.clip(v / 6 + 0.5, 0.0, 1.0),
    "Swish": lambda v, s: v * expit(s.attr("alpha", 1.0) * v),
    "Gelu": lambda v, s: _gelu(v, s.attr("approximate", "none")),
    "Mish": lambda v, s: v * np.tanh(np.logaddexp(0.0, v)),
}


@table.rule("FastGelu", "BiasGelu", "QuickGelu")
def fused_gelu(seen: Seen) -> list[Fact | None]:
    """Of com.microsoft: an optional bias is added first."""
    x, shape = seen.fact(0), seen.shape(0)
    low, high = x.low, x.high
    kind = None if x.kind is None else joined(seen.function, [x], [shape], x.kind.ndim)
    if seen.has(1):
        bias = seen.fact(1)
        low, high = low + bias.low, high + bias.high
        kind = joined(seen.function, [x, bias], [shape, seen.shape(1)], len(shape))
    known = (low == high) & np.isfinite(low)
    at = np.where(known, low, 0.0)
    if seen.node.op_type == "QuickGelu":
        value = at * expit(seen.attr("alpha", 1.702) * at)
    else:
        value = _gelu(at, "tanh" if seen.node.op_type == "FastGelu" else "none")
    alpha = seen.attr("alpha", 1.702) if seen.node.op_type == "QuickGelu" else 1.0
    if alpha <= 0:
        return [None]
    bottom = np.where(low >= 0, 0.0, DEEPEST / min(alpha, 1.0))
    return [Fact(np.where(known, value, bottom), np.where(known, value, np.maximum(high, 0)), kind)]


def _gelu(v: Floats, approximate: str) -> Any:
    if approximate == "tanh":
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
    return 0.5 * v * (1 + erf(v / np.sqrt(2)))


@table.rule(*UNARY, "Dropout", "CastLike")
def unary(seen: Seen) -> list[Fact | None]:
    x, kind = seen.fact(0), None
    if x.kind is not None and seen.node.op_type != "CastLike":  # like what, no attribute says
        kind = joined(seen.function, [x], [seen.shape(0)], x.kind.ndim)
    return [replace(_bounds(seen, x), kind=kind)]


def _bounds(seen: Seen, x: Fact) -> Fact:
    name, blank = seen.node.op_type, np.full((1,) * x.low.ndim, np.inf)
    if name in ("Identity", "Dropout") or (name == "Cast" and seen.attr("to") in FLOAT_TYPES):
        return x
    curve = RISING.get(name)
    if curve is not None and not (name in NEED_ALPHA and seen.attr("alpha", 1.0) < 0):
        return Fact(_finite_or(curve(x.low, seen), x.low), _finite_or(curve(x.high, seen), x.high))
    curve = DIPPING.get(name)
    if curve is not None and seen.attr("alpha", 1.0) > 0:
        at = np.where(x.known, curve(np.where(x.known, x.low, 0.0), seen), 0.0)
        low = np.where(x.known, at, np.where(x.low >= 0, 0.0, DEEPEST / seen.attr("alpha", 1.0)))
        return Fact(low, np.where(x.known, at, np.maximum(x.high, 0.0)))
    return Fact(-blank, blank)


def _finite_or(value: Any, given: Floats) -> Floats:
    """Curves that make NaN of an infinite bound keep it."""
    return np.where(np.isnan(value), given, value)


@table.rule("Clip")
def clip(seen: Seen) -> list[Fact | None]:
    x = seen.fact(0)
    ends = []
    for index, attr, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        value = seen.attr(attr, default)
        if seen.has(index):
            if not seen.fixed(index):
                return [None]
            value = float(seen.weight(index).reshape(-1)[0])
        ends.append(value)
    low, high = (np.minimum(np.maximum(a, ends[0]), ends[1]) for a in (x.low, x.high))
    kind = None
    if x.kind is not None:
        said = word("Clip", *(float(end).hex() for end in ends))
        kind = joined(said, [x], [seen.shape(0)], x.kind.ndim)
    return [Fact(low, high, kind)]


@table.rule(*BROADCAST)
def broadcast(seen: Seen) -> list[Fact | None]:
    """Intervals of sums, products and choices."""
    rank = len(seen.result())
    facts = [seen.fact(i) for i in range(len(seen.node.input))]
    shapes = [seen.shape(i) for i in range(len(facts))]
    kind = joined(seen.function, facts, shapes, rank)
    sides = [ranked(fact, rank) for fact in facts]
    of = INTERVALS.get(seen.node.op_type)
    blank = np.full((1,) * rank, np.inf)
    low, high = (-blank, blank) if of is None else of(*sides)
    return [coarse(Fact(low, high, kind))]


def _sum(a: Fact, b: Fact) -> tuple[Floats, Floats]:
    return a.low + b.low, a.high + b.high


def _difference(a: Fact, b: Fact) -> tuple[Floats, Floats]:
    return a.low - b.high, a.high - b.low


def _product(a: Fact, b: Fact) -> tuple[Floats, Floats]:
    """Zero times anything is zero."""
    pairs = [p * q for p in (a.low, a.high) for q in (b.low, b.high)]
    ends = [np.where(np.isnan(p), 0.0, p) for p in pairs]
    return np.minimum.reduce(ends), np.maximum.reduce(ends)


def _quotient(a: Fact, b: Fact) -> tuple[Floats, Floats]:
    safe = (b.low > 0) | (b.high < 0)
    inverse = Fact(1 / np.where(safe, b.high, 1.0), 1 / np.where(safe, b.low, 1.0))
    low, high = _product(a, inverse)
    return np.where(safe, low, -np.inf), np.where(safe, high, np.inf)


def _power(a: Fact, b: Fact) -> tuple[Floats, Floats]:
    known = a.known & b.known
    with np.errstate(all="ignore"):
        value = np.power(np.where(known, a.low, 1.0), np.where(known, b.low, 1.0))
    known = known & np.isfinite(value)
    return np.where(known, value, -np.inf), np.where(known, value, np.inf)


def _leaky(a: Fact, b: Fact) -> tuple[Floats, Floats]:
    """Above zero the first, below it their product."""
    below = _product(Fact(np.minimum(a.low, 0), np.minimum(a.high, 0)), b)
    return np.maximum(a.low, 0) + below[0], np.maximum(a.high, 0) + below[1]


def _choice(condition: Fact, a: Fact, b: Fact) -> tuple[Floats, Floats]:
    yes, no = condition.known & (condition.low != 0), condition.known & (condition.low == 0)
    low = np.where(yes, a.low, np.where(no, b.low, np.minimum(a.low, b.low)))
    high = np.where(yes, a.high, np.where(no, b.high, np.maximum(a.high, b.high)))
    return low, high


def _largest(*sides: Fact) -> tuple[Floats, Floats]:
    low, high = sides[0].low, sides[0].high
    for side in sides[1:]:
        low, high = np.maximum(low, side.low), np.maximum(high, side.high)
    return low, high


def _smallest(*sides: Fact) -> tuple[Floats, Floats]:
    low, high = sides[0].low, sides[0].high
    for side in sides[1:]:
        low, high = np.minimum(low, side.low), np.minimum(high, side.high)
    return low, high


def _total(*sides: Fact) -> tuple[Floats, Floats]:
    low, high = sides[0].low, sides[0].high
    for side in sides[1:]:
        low, high = low + side.low, high + side.high
    return low, high


INTERVALS: dict[str, Callable[..., tuple[Floats, Floats]]] = {
    "Add": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Div": _quotient,
    "Pow": _power,
    "PRelu": _leaky,
    "Where": _choice,
    "Max": _largest,
    "Min": _smallest,
    "Sum": _total,
}
