"""Random control flow: branches, loops and scans in one another, that capture what is around."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.api import prune
from graphprune.check import check_rule
from graphprune.errors import NothingPrunableError

WIDTH, DEEPEST = 8, 3
FLAT = ("linear", "linear", "narrow", "residual", "activation", "captured")
DEEP = ("If", "Loop", "While", "Scan")


class Scope:
    """The nodes of one graph; names say how deep it is, so bodies beside each other share them."""

    def __init__(self, choose: random.Random, depth: int, outer: Sequence[str]) -> None:
        self.choose, self.depth, self.outer = choose, depth, list(outer)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"d{self.depth}_{self.count}"

    def weight(self, *shape: int) -> str:
        """An initialiser or a Constant."""
        name = self.name()
        rng = np.random.default_rng(self.choose.randrange(2**32))
        array = (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)
        tensor = numpy_helper.from_array(array, name)
        if self.choose.random() < 0.3:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, inputs, [name], f"{op}_{name}", **attributes))
        return name

    def product(self, x: str, a: int = WIDTH, b: int = WIDTH) -> str:
        return self.add("MatMul", x, self.weight(a, b))

    def block(self, x: str) -> str:
        kind = self.choose.choice(FLAT + DEEP if self.depth < DEEPEST else FLAT)
        made = {
            "linear": self.product,
            "narrow": lambda x: self.product(self.add("Relu", self.product(x, WIDTH, 6)), 6, WIDTH),
            "residual": lambda x: self.add("Add", x, self.add("Tanh", self.product(x))),
            "activation": lambda x: self.add(self.choose.choice(["Relu", "Tanh", "Neg"]), x),
            "captured": lambda x: self.add("Add", x, self.choose.choice(self.outer)),
            "If": self.branches,
            "Loop": lambda x: self.loop(x, False),
            "While": lambda x: self.loop(x, True),
            "Scan": self.scan,
        }
        return made[kind](x)

    def above(self, x: str) -> str:
        return self.add("Greater", self.add("ReduceMax", x, keepdims=0), "half")

    def inner(self, x: str) -> Scope:
        return Scope(self.choose, self.depth + 1, [*self.outer, x])

    def branches(self, x: str) -> str:
        condition = self.choose.choice(["c", "d"]) if self.choose.random() < 0.7 else self.above(x)
        graphs = []
        for _ in range(2):
            scope = self.inner(x)
            y = scope.add("Identity", scope.block(scope.block(self.choose.choice(scope.outer))))
            graphs.append(graph(scope, [], [declared(y, self.choose.random() < 0.5)]))
        return self.add("If", condition, then_branch=graphs[0], else_branch=graphs[1])

    def loop(self, x: str, stops: bool) -> str:
        scope, state = self.inner(x), f"s{self.depth}"
        scope.outer.append(state)
        y = scope.add("Identity", scope.block(scope.block(state)))
        on = scope.above(y) if stops else scope.add("Identity", f"g{self.depth}")
        formal = [
            helper.make_tensor_value_info(f"i{self.depth}", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"g{self.depth}", TensorProto.BOOL, []),
            declared(state),
        ]
        given = [helper.make_tensor_value_info(on, TensorProto.BOOL, []), declared(y)]
        given.append(declared(scope.add("Tanh", y)))
        end, stacked = self.name(), self.name()
        body = graph(scope, formal, given)
        self.nodes.append(
            helper.make_node("Loop", ["n", "d" if stops else "", x], [end, stacked], body=body)
        )
        if stops or self.choose.random() < 0.5:
            return end
        return self.add("Add", end, self.add("ReduceSum", stacked, "first", keepdims=0))

    def scan(self, x: str) -> str:
        scope, state, one = self.inner(x), f"s{self.depth}", f"e{self.depth}"
        y = scope.add("Identity", scope.block(scope.add("Add", state, one)))
        z = scope.add("Relu", y)
        body = graph(scope, [declared(state), declared(one)], [declared(y), declared(z)])
        both = [self.add("Unsqueeze", t, "first") for t in (x, self.choose.choice(self.outer))]
        stack = self.add("Concat", *both, axis=0)
        end, stacked = self.name(), self.name()
        self.nodes.append(
            helper.make_node("Scan", [x, stack], [end, stacked], body=body, num_scan_inputs=1)
        )
        return self.add("Add", end, self.add("ReduceSum", stacked, "first", keepdims=0))


def declared(name: str, sized: bool = True) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, WIDTH] if sized else None)


def graph(
    scope: Scope, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.GraphProto:
    return helper.make_graph(scope.nodes, "body", inputs, outputs, scope.initializers)


def random_control_flow(seed: int) -> onnx.ModelProto:
    choose = random.Random(seed)
    scope = Scope(choose, 0, ["x"])
    y = scope.product("x")
    for _ in range(choose.randint(2, 4)):
        scope.outer.append(y)
        y = scope.block(y)
    y = scope.product(scope.branches(y), WIDTH, 3)
    for name, value in (("n", 2), ("first", [0]), ("half", np.float32(0.5))):
        scope.initializers.append(numpy_helper.from_array(np.array(value), name))
    bools = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in "cd"]
    output = helper.make_tensor_value_info(y, TensorProto.FLOAT, [2, 3])
    whole = graph(scope, [declared("x"), *bools], [output])
    opset = helper.make_opsetid("", 17)
    return helper.make_model(whole, opset_imports=[opset], ir_version=8)


@pytest.mark.parametrize("seed", range(10))
def test_random_control_flow(seed: int) -> None:
    model = random_control_flow(seed)
    onnx.checker.check_model(model)
    try:
        result = prune(
            model, flops=0.6, criterion="l1", repair="none", measure=False, allow_miss=True
        )
        assert result.verdict.passed
        onnx.checker.check_model(result.model, full_check=True)
    except NothingPrunableError as error:
        assert error.where  # says what pins everything
    x = np.random.default_rng(seed).standard_normal((2, WIDTH)).astype(np.float32)
    for c, d in ((True, True), (False, False)):
        check_rule(model, {"x": x, "c": np.array(c), "d": np.array(d)})
