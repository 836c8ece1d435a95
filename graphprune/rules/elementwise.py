"""Operators that compute each element from the elements at the same place."""

from __future__ import annotations

from graphprune.rules.op import Op, RefusedError, Table

table = Table()

UNARY = """
Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu
HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu
Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
""".split()

BROADCAST = """
Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual
Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor
""".split()


@table.rule(*UNARY)
def unary(op: Op) -> None:
    """One input, one output, the same shape."""
    op.same(op.input(0), op.output())
    if op.type == "Identity":
        op.view()
    else:
        op.in_place(0)


@table.rule(*BROADCAST)
def broadcast(op: Op) -> None:
    """Any number of inputs, aligned from the right; axes of size 1 stretch."""
    for x in op.x:
        if x is not None:
            op.broadcast(x, op.output())
    op.in_place(*range(len(op.x)))


@table.rule("Clip", "CastLike")
def scalar_parameters(op: Op) -> None:
    """Further inputs are scalars or only lend their type."""
    op.same(op.input(0), op.output())
    op.in_place(0)
    for x in op.x[1:]:
        if x is not None:
            op.free(*x)


@table.rule("Dropout")
def dropout(op: Op) -> None:
    """Identity at inference; the optional mask has the same shape."""
    training = op.value(2)
    if op.has(2) and (training is None or training.any()):
        raise RefusedError("random at run time (training mode)")
    op.view()
    for y in op.y:
        if y is not None:
            op.same(op.input(0), y)
    for x in op.x[1:]:
        if x is not None:
            op.free(*x)
