"""Fused operators of ONNX Runtime (domain com.microsoft) other than attention.

Inputs and attributes as in ONNX Runtime's docs/ContribOperators.md.
"""

from __future__ import annotations

from graphprune.relations import Role
from graphprune.rules import elementwise, linear, movement, normalisation, pooling
from graphprune.rules.op import Op, RefusedError, Table

MICROSOFT = "com.microsoft"

table = Table()

for name in ("Gelu", "QuickGelu"):
    table[MICROSOFT, name] = elementwise.unary
for name in ("BiasGelu", "FastGelu"):  # FastGelu's bias may be absent
    table[MICROSOFT, name] = elementwise.broadcast
table[MICROSOFT, "Trilu"] = movement.table["", "Trilu"]
table[MICROSOFT, "GridSample"] = pooling.table["", "GridSample"]
# ONNX Runtime registers it in the domain of ONNX; fused models also name com.microsoft.
for domain in ("", MICROSOFT):
    table[domain, "SimplifiedLayerNormalization"] = normalisation.layer_normalization


@table.rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_normalization(op: Op) -> None:
    """``x + skip + bias`` is normalised over its last axis; the sum is the fourth output.

    ``skip`` may lack the batch or have a batch of 1.
    """
    x = op.input(0)
    op.same(x, op.output())
    for parameter in op.x[1:]:
        if parameter is not None:
            op.broadcast(parameter, x)
    _statistics(op, x.rank - 1)
    if len(op.y) > 3 and op.y[3] is not None:
        op.same(x, op.output(3))
    op.shift(x[x.rank - 1])


def _statistics(op: Op, axis: int) -> None:
    """Outputs 1 and 2 hold a mean and an inverse deviation for each row."""
    for statistic in op.y[1:3]:
        if statistic is not None:
            op.same(op.input(0), statistic, but=[axis])
            op.free(statistic[axis])


@table.rule("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(op: Op) -> None:
    """The sum of word, position and segment rows, normalised over the width.

    Batch, length and the rows of the tables are left unspoken, so they stay.
    """
    y = op.output()
    for index in (2, 3, 4):
        if op.has(index):
            op.tie(op.input(index)[1], y[2])
    for index in (5, 6):
        op.tie(op.input(index)[0], y[2])
    if len(op.y) > 2 and op.y[2] is not None:
        op.tie(y[2], op.output(2)[2])
    op.shift(y[2])


@table.rule("FusedConv", domain=MICROSOFT)
def fused_conv(op: Op) -> None:
    """A convolution, the sum with ``z`` where it is given, and an activation."""
    linear.conv(op)
    if op.has(3):
        op.in_place(3)
        op.tie(op.input(3)[0], op.output()[0])
        op.tie(op.input(3)[1], op.output()[1])


@table.rule("FusedGemm", domain=MICROSOFT)
def fused_gemm(op: Op) -> None:
    """Gemm and an activation, which may be one that takes statistics (Softmax)."""
    linear.gemm(op)
    if "softmax" in str(op.attr("activation", "")).lower():
        op.shift(op.output()[1])


@table.rule("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(op: Op) -> None:
    """``y = alpha * a' @ b'``: the last two axes of either may be exchanged first.

    With transBatchA or transBatchB the first axis goes where the last but one stood.
    """
    if op.attr("transBatchA", 0) or op.attr("transBatchB", 0):
        raise RefusedError("transposed batch axes")
    a, b = op.input(0), op.input(1)
    swapped = (bool(op.attr("transA", 0)) and a.rank > 1, bool(op.attr("transB", 0)) and b.rank > 1)
    linear.product(op, *swapped)


@table.rule("MatMulNBits", domain=MICROSOFT)
def matmul_n_bits(op: Op) -> None:
    """``b``: [N, blocks, bytes] holds ``block_size`` inputs in a block; scales one for each block.

    Rows leave freely; inputs leave by whole blocks, unless zero points are packed into bytes.
    """
    x, b, scales, y = op.input(0), op.input(1), op.input(2), op.output()
    bits, size = int(op.attr("bits", 4)), int(op.attr("block_size", 32))
    rows, blocks, width = b[0], b[1], x[x.rank - 1]
    if op.attr("weight_prepacked", 0):
        raise RefusedError("weights packed for one processor")
    if op.has(4):
        raise RefusedError("inputs in another order (g_idx)")
    for i in range(x.rank - 1):
        op.produce(x[i], y[i])
    op.produce(rows, y[y.rank - 1])
    op.count_attr("N", rows)
    op.contract(0, x.rank - 1)
    op.count_attr("K", width)
    inside = op.virtual(size)
    op.pin(inside, "a block of inputs shares a scale and leaves as a whole")
    if len(width) == len(blocks) * size:
        op.fold(width, [blocks, inside])
    else:
        op.pin(width, "the last block is not full")
        op.pin(blocks, "the last block is not full")
    _block_parameter(op, 2)
    if scales.rank == 2:
        op.plays(scales[0], Role.PRODUCER)
        op.plays(scales[1], Role.CONSUMER)
    if op.has(3):
        _block_parameter(op, 3, packed=8 // bits)
    if op.has(5):
        op.tie(op.input(5)[0], rows)
    op.macs(*y, width)


def _block_parameter(op: Op, index: int, packed: int = 1) -> None:
    """One number for each row and block, as a matrix or row-major; bytes may pack several."""
    rows, blocks = op.input(1)[0], op.input(1)[1]
    parameter = op.input(index)
    columns = parameter[1] if parameter.rank == 2 else None
    per_row = int(len(parameter[0]) / len(rows)) if columns is None else len(columns)
    bytewise = packed > 1 and per_row != len(blocks)
    if bytewise:
        op.pin(blocks, "zero points of several blocks share a byte")
    inner = op.virtual(per_row) if bytewise else blocks.slots
    if columns is None:
        op.fold(parameter[0], [rows, inner])
    else:
        op.tie(parameter[0], rows)
        op.tie(columns, inner)


@table.rule("MoE", domain=MICROSOFT)
def mixture_of_experts(op: Op) -> None:
    """``up``: [experts, inner, width], ``down``: [experts, width, inner], and a bias of each.

    A unit is the same inner position of every expert, or an expert. With ``swiglu_fusion`` the rows
    of ``up`` hold gates too, in turns (1) or behind all others (2). Tokens stay.
    """
    x, up, down, y = op.input(0), op.input(2), op.input(4), op.output()
    if op.has(6):
        raise RefusedError("gates with weights of their own, which no CPU kernel has")
    fusion = int(op.attr("swiglu_fusion", 0))
    inner, rows = down[2], up[1].slots
    width = x[x.rank - 1]
    for half in rows.reshape(-1, 2).T if fusion == 1 else rows.reshape(1 + bool(fusion), -1):
        op.tie(half, inner)
    op.plays(up[1], Role.PRODUCER)
    op.consume(width, 2, 2)
    op.contract(4, 2)
    op.produce(down[1], y[y.rank - 1])
    op.tie(width, y[y.rank - 1])
    for bias, weight in ((3, up), (5, down)):
        if op.has(bias):
            op.tie(op.input(bias)[1], weight[1])
    router = op.input(1)
    op.choose(1, router.rank - 1, int(op.attr("k", 1)))
    for index in (2, 3, 4, 5):
        if op.has(index):
            op.tie(op.input(index)[0], router[router.rank - 1])
    op.experts(up[0])
    op.experts(down[0])
    used = op.virtual(int(op.attr("k", 1)))
    for weight in (up, down):
        op.macs(*x.axes[:-1], used, *weight.axes[1:])


@table.rule("QMoE", domain=MICROSOFT)
def quantised_mixture(op: Op) -> None:
    """As ``MoE`` with integers for weights, packed along what they sum over: experts alone leave,
    with their scales, biases and zero points."""
    if op.attr("quant_type", "int") != "int":
        raise RefusedError("weights of small floats, which no CPU kernel has")
    if op.attr("weights_prepacked", 0):
        raise RefusedError("weights packed for one processor")
    x, up, down, router = op.input(0), op.input(2), op.input(5), op.input(1)
    experts, taken = router[router.rank - 1], int(op.attr("k", 1))
    op.choose(1, router.rank - 1, taken)
    for index in range(2, 14):
        if op.has(index):
            op.tie(op.input(index)[0], experts)
    if op.has(14):  # the shares, where the router's numbers only choose
        op.tie(op.input(14)[1], experts)
    op.experts(up[0])
    op.experts(down[0])
    for axis in (x[x.rank - 1], op.output()[x.rank - 1], up[1], down[1]):
        op.pin(axis, "integers are packed along what is summed over; experts alone may leave")
    inner = up[1] if int(op.attr("swiglu_fusion", 0)) == 0 else op.virtual(len(up[1]) // 2)
    used, width = op.virtual(taken), x[x.rank - 1]
    op.macs(*x.axes[:-1], used, up[1], width)
    op.macs(*x.axes[:-1], used, inner, width)
