"""Derivatives of operators that act on each element by itself: one line each.

Masks are taken from the *output* where that decides them (Relu, Clip): the producer's fusion with
its activation then survives, because nothing else reads what stands between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

from graphprune.gradient.rules import RULES, Step, StopError, rule
from graphprune.gradient.tape import Value


def _inside(value: Value, low: float, high: float) -> Value:
    return value.above(low) * value.below(high)


def _two_sided(node: Step, right: float, left: float) -> Value:
    """``right`` for positive inputs, ``left`` for the others."""
    return node.x().above(0.0) * (right - left) + left


def _exponential_tail(node: Step, right: float, left: float, width: float = 1.0) -> Value:
    """``right`` for positive inputs, left·exp(x/width) for the others."""
    positive = node.x().above(0.0)
    held = node.x() * (1.0 - positive)  # where x > 0 the exponential could overflow
    return positive * right + (1.0 - positive) * (held / width).op("Exp") * left


def _hard_swish(node: Step) -> Value:
    """x·h(x) with h = clip(x/6 + 1/2, 0, 1)."""
    h = node.x().op("HardSigmoid", alpha=1 / 6, beta=0.5)
    return h + node.x() * _inside(h, 0.0, 1.0) * (1 / 6)


def _swish(x: Value, alpha: float) -> Value:
    """x·s(αx): s + αx·s·(1 − s)."""
    s = (x * alpha).op("Sigmoid")
    return s * (1.0 + x * (1.0 - s) * alpha)


def _mish(node: Step) -> Value:
    """x·tanh(softplus(x))."""
    t = node.x().op("Softplus").op("Tanh")
    return t + node.x() * (1.0 - t * t) * node.x().op("Sigmoid")


def _gelu(node: Step) -> Value:
    x = node.x()
    if node.attribute("approximate", "none") == "tanh":  # x/2·(1 + tanh(a·(x + b·x³)))
        a, b = sqrt(2 / pi), 0.044715
        t = ((x + x * x * x * b) * a).op("Tanh")
        return (t + 1.0) * 0.5 + x * (1.0 - t * t) * (x * x * (3 * b) + 1.0) * (a / 2)
    normal = (x * (1 / sqrt(2))).op("Erf") * 0.5 + 0.5
    return normal + x * (x * x * -0.5).op("Exp") * (1 / sqrt(2 * pi))


# dy/dx from the node alone, times the cotangent.
DERIVATIVES: dict[str, Callable[[Step], Value | float]] = {
    # piecewise linear
    "Relu": lambda n: n.y.above(0.0),
    "LeakyRelu": lambda n: _two_sided(n, 1.0, n.attribute("alpha", 0.01)),
    "ThresholdedRelu": lambda n: n.x().above(n.attribute("alpha", 1.0)),
    "HardSigmoid": lambda n: _inside(n.y, 0.0, 1.0) * n.attribute("alpha", 0.2),
    "HardSwish": _hard_swish,
    "Abs": lambda n: n.x().op("Sign"),
    "Neg": lambda n: -1.0,
    # exponential and the like
    "Exp": lambda n: n.y,
    "Log": lambda n: 1.0 / n.x(),
    "Sqrt": lambda n: 0.5 / n.y,
    "Reciprocal": lambda n: -(n.y * n.y),
    "Sin": lambda n: n.x().op("Cos"),
    "Cos": lambda n: -n.x().op("Sin"),
    "Erf": lambda n: (-(n.x() * n.x())).op("Exp") * (2 / sqrt(pi)),
    # activations
    "Sigmoid": lambda n: n.y * (1.0 - n.y),
    "Tanh": lambda n: 1.0 - n.y * n.y,
    "Softplus": lambda n: n.x().op("Sigmoid"),
    "Softsign": lambda n: (1.0 - n.y.op("Abs")) ** 2.0,
    "Elu": lambda n: _exponential_tail(n, 1.0, n.attribute("alpha", 1.0)),
    "Celu": lambda n: _exponential_tail(n, 1.0, 1.0, n.attribute("alpha", 1.0)),
    "Selu": lambda n: _exponential_tail(
        n,
        n.attribute("gamma", 1.0507010),
        n.attribute("gamma", 1.0507010) * n.attribute("alpha", 1.6732632),
    ),
    "Gelu": _gelu,
    "Mish": _mish,
    "Swish": lambda n: _swish(n.x(), n.attribute("alpha", 1.0)),
}
# Their derivative is zero wherever it exists.
FLAT = "Floor Ceil Round Sign".split()


def _scaled(node: Step) -> None:
    node.give(0, node.g * DERIVATIVES[node.node.op_type](node))


RULES.update(dict.fromkeys(DERIVATIVES, _scaled))
RULES.update(dict.fromkeys(FLAT, lambda node: None))


@rule("Identity", "Dropout")
def identity(node: Step) -> None:
    """Dropout does nothing in inference."""
    node.give(0, node.g)


@rule("Cast", "CastLike")
def cast(node: Step) -> None:
    """Back to the input's element type."""
    node.give(0, node.g.cast(node.x().dtype))


@rule("Clip")
def clip(node: Step) -> None:
    """Bounds are attributes up to opset 10, optional inputs after."""
    g = node.g
    for name, index, compare in (("min", 1, Value.above), ("max", 2, Value.below)):
        bound = node.constant(index).item() if node.has(index) else node.attribute(name)
        if bound is not None and abs(bound) < 3e38:  # the largest float32 stands for "none"
            g = g * compare(node.y, float(bound))
    node.give(0, g)


@rule("PRelu")
def prelu(node: Step) -> None:
    """The slope broadcasts to the input."""
    positive = node.x().above(0.0)
    node.give(0, node.g * (positive + (1.0 - positive) * node.x(1)))
    if node.wants(1):
        raise StopError("the slope depends on the input")


@rule("Add", "Sum")
def add(node: Step) -> None:
    for index in range(len(node.node.input)):
        if node.wants(index):
            node.give(index, node.g.sum_to(node.x(index).shape))


@rule("Mean")
def mean(node: Step) -> None:
    for index in range(len(node.node.input)):
        if node.wants(index):
            share = node.g * (1 / len(node.node.input))
            node.give(index, share.sum_to(node.x(index).shape))


@rule("Sub")
def subtract(node: Step) -> None:
    node.give(0, node.g.sum_to(node.x().shape))
    if node.wants(1):
        node.give(1, (-node.g).sum_to(node.x(1).shape))


@rule("Mul")
def multiply(node: Step) -> None:
    for index in (0, 1):
        if node.wants(index):
            node.give(index, (node.g * node.x(1 - index)).sum_to(node.x(index).shape))


@rule("Div")
def divide(node: Step) -> None:
    if node.wants(0):
        node.give(0, (node.g / node.x(1)).sum_to(node.x().shape))
    if node.wants(1):
        node.give(1, (-(node.g * node.y) / node.x(1)).sum_to(node.x(1).shape))


@rule("Pow")
def power(node: Step) -> None:
    """p·x^(p−1) for a constant exponent."""
    if node.wants(1):
        raise StopError("the exponent depends on the input")
    exponent = node.constant(1).astype(float)
    x = node.x()
    slope = (
        x * x.constant(exponent)
        if (exponent == 2).all()
        else (x ** x.constant(exponent - 1) * x.constant(exponent))
    )
    node.give(0, (node.g * slope).sum_to(x.shape))


@rule("Max", "Min")
def extreme(node: Step) -> None:
    """To the input that won; to each of them where several did."""
    beats = Value.below if node.node.op_type == "Max" else Value.above
    for index in range(len(node.node.input)):
        if node.wants(index):
            x = node.x(index)
            node.give(index, (node.g * (1.0 - beats(x, node.y))).sum_to(x.shape))


@rule("Where")
def where(node: Step) -> None:
    """The condition passes nothing on."""
    chosen = node.x(0).cast(node.g.dtype)
    if node.wants(1):
        node.give(1, (node.g * chosen).sum_to(node.x(1).shape))
    if node.wants(2):
        node.give(2, (node.g * (1.0 - chosen)).sum_to(node.x(2).shape))
