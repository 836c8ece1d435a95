"""Further damage to models: bombs, endless loops, odd types, and what stands inside bodies."""

from __future__ import annotations

import random

import numpy as np
import onnx
from mutations import MUTATIONS, SIZES, TEXTS, Mutation, pick
from onnx import TensorProto, helper, numpy_helper


def between(model: onnx.ModelProto, choose: random.Random) -> tuple[onnx.NodeProto, int] | None:
    """A node and an input of it to put something before."""
    nodes = [node for node in model.graph.node if any(node.input)]
    node = pick(choose, nodes)
    if node is None:
        return None
    return node, choose.choice([i for i, name in enumerate(node.input) if name])


def put(model: onnx.ModelProto, place: tuple[onnx.NodeProto, int], *nodes: onnx.NodeProto) -> None:
    """The nodes before that input, which reads the last one's first output from then on."""
    node, at = place
    index = list(model.graph.node).index(node)
    node.input[at] = nodes[-1].output[0]
    rest = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*rest[:index], *nodes, *rest[index:]])


def stored(model: onnx.ModelProto, name: str, value: object) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


# --- sizes


def long_chain(model: onnx.ModelProto, choose: random.Random) -> None:
    place = between(model, choose)
    if place is None:
        return
    length = choose.choice((30, 300, 300, 3000))
    source, nodes = place[0].input[place[1]], []
    for i in range(length):
        op = choose.choice(("Identity", "Relu", "Neg", "Abs"))
        nodes.append(helper.make_node(op, [source], [f"chain_{i}"]))
        source = f"chain_{i}"
    put(model, place, *nodes)


def bomb(model: onnx.ModelProto, choose: random.Random) -> None:
    """A few bytes that stand for a tensor of any size, computed from constants alone."""
    place = between(model, choose)
    if place is None:
        return
    many = choose.choice((2**20, 2**31, 2**40, 2**62))
    sizes = stored(model, "bomb_sizes", np.array(choose.choice(([many], [2**20] * 4, [-many]))))
    one = stored(model, "bomb_one", np.float32(1))
    kind = choose.randrange(6)
    if kind == 0:
        nodes = [helper.make_node("ConstantOfShape", [sizes], ["bomb"])]
    elif kind == 1:
        nodes = [helper.make_node("Expand", [one, sizes], ["bomb"])]
    elif kind == 2:
        ends = [stored(model, f"bomb_{i}", np.int64(v)) for i, v in enumerate((0, many, 1))]
        nodes = [helper.make_node("Range", ends, ["bomb"])]
    elif kind == 3:
        line = stored(model, "bomb_line", np.ones(3, np.float32))
        times = stored(model, "bomb_times", np.array([many]))
        nodes = [helper.make_node("Tile", [line, times], ["bomb"])]
    elif kind == 4:
        depth = stored(model, "bomb_depth", np.int64(many))
        places = stored(model, "bomb_places", np.arange(3))
        values = stored(model, "bomb_values", np.array([0, 1], np.float32))
        nodes = [helper.make_node("OneHot", [places, depth, values], ["bomb"])]
    else:
        line = stored(model, "bomb_line", np.ones(3, np.float32))
        pads = stored(model, "bomb_pads", np.array([0, many]))
        nodes = [helper.make_node("Pad", [line, pads], ["bomb"])]
    put(model, place, *nodes)


def functions_of_functions(model: onnx.ModelProto, choose: random.Random) -> None:
    """Each calls the next twice."""
    place = between(model, choose)
    if place is None:
        return
    depth = choose.choice((3, 8, 40, 90, 300))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("many", 1)]
    for i in range(depth):
        inner = [helper.make_node("Relu", ["x"], ["y"])]
        if i < depth - 1:
            inner = [
                helper.make_node(f"f{i + 1}", [a], [b], domain="many") for a, b in ("xm", "my")
            ]
        function = helper.make_function("many", f"f{i}", ["x"], ["y"], inner, opsets)
        model.functions.append(function)
    model.opset_import.append(opsets[1])
    source = place[0].input[place[1]]
    put(model, place, helper.make_node("f0", [source], ["many"], domain="many"))


def endless(model: onnx.ModelProto, choose: random.Random) -> None:
    """A Loop around one tensor that ends late or never."""
    place = between(model, choose)
    if place is None:
        return
    source = place[0].input[place[1]]
    trips = stored(model, "loop_trips", np.int64(choose.choice((0, -1, 5, 2**62))))
    going = stored(model, "loop_going", np.array(choose.random() < 0.7))
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["loop_on"], ["loop_stays"]),
            helper.make_node(choose.choice(("Relu", "Identity")), ["loop_in"], ["loop_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("loop_turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("loop_on", TensorProto.BOOL, []),
            onnx.ValueInfoProto(name="loop_in"),
        ],
        [
            helper.make_tensor_value_info("loop_stays", TensorProto.BOOL, []),
            onnx.ValueInfoProto(name="loop_out"),
        ],
    )
    names = [*choose.choice(((trips, going), ("", going), (trips, ""), ("", ""))), source]
    put(model, place, helper.make_node("Loop", names, ["looped"], body=body))


def many_attributes(model: onnx.ModelProto, choose: random.Random) -> None:
    node = pick(choose, model.graph.node)
    attribute = pick(choose, node.attribute)
    if attribute is None:
        attribute = node.attribute.add(name="axes")
    value = choose.choice(([1] * 100_000, [0.5] * 100_000, ["a"] * 1000, "n" * (1 << 20)))
    attribute.CopyFrom(helper.make_attribute(attribute.name, value))


# --- types


def empty_weight(model: onnx.ModelProto, choose: random.Random) -> None:
    """A weight of no element, its data as its shape says."""
    tensor = pick(choose, [t for t in model.graph.initializer if t.dims])
    if tensor is not None:
        array = numpy_helper.to_array(tensor)
        axis = choose.randrange(array.ndim)
        none = array.take([], axis) if choose.random() < 0.7 else array.reshape(-1)[:0]
        tensor.CopyFrom(numpy_helper.from_array(none, tensor.name))


def strings(model: onnx.ModelProto, choose: random.Random) -> None:
    """Text where numbers stood, whole and sound."""
    tensor = pick(choose, model.graph.initializer)
    if tensor is not None and numpy_helper.to_array(tensor).size < 10_000:
        array = numpy_helper.to_array(tensor)
        text = np.full(array.shape, choose.choice(TEXTS[:3]), object)
        tensor.CopyFrom(numpy_helper.from_array(text, tensor.name))


def odd_type(model: onnx.ModelProto, choose: random.Random) -> None:
    """Sequences, maps, optional and sparse values at the interface, also inside one another."""
    value = pick(choose, (*model.graph.input, *model.graph.output, *model.graph.value_info))
    if value is None:
        return
    kind = onnx.TypeProto()
    kind.CopyFrom(value.type)
    for _ in range(choose.choice((1, 1, 2, 30))):
        outer = onnx.TypeProto()
        which = choose.randrange(4)
        if which == 0:
            outer.sequence_type.elem_type.CopyFrom(kind)
        elif which == 1:
            outer.optional_type.elem_type.CopyFrom(kind)
        elif which == 2:
            outer.map_type.key_type = choose.choice((7, 8, 0))
            outer.map_type.value_type.CopyFrom(kind)
        else:
            outer.sparse_tensor_type.elem_type = choose.choice((1, 0, 99))
        kind = outer
    value.type.CopyFrom(kind)


def contradiction(model: onnx.ModelProto, choose: random.Random) -> None:
    """A declared type of an inner tensor that is not its own."""
    names = [name for node in model.graph.node for name in node.output if name]
    if names:
        dims = [choose.choice((*SIZES, "n", None)) for _ in range(choose.randrange(5))]
        kind = choose.choice((0, 1, 7, 8, 10, 99))
        value = helper.make_tensor_value_info(choose.choice(names), kind, dims)
        model.graph.value_info.extend([value] * choose.choice((1, 1, 2)))


# --- names


def one_name(model: onnx.ModelProto, choose: random.Random) -> None:
    """Every node has the same name, or none."""
    name = choose.choice(TEXTS)
    for node in model.graph.node:
        node.name = name


def swap_names(model: onnx.ModelProto, choose: random.Random) -> None:
    """Names as the program itself might give them."""
    names = [name for node in model.graph.node for name in node.output if name]
    old = pick(choose, names)
    new = choose.choice(("graphprune/masked_0", "graphprune/true", "a/graphprune_1", "then/x"))
    for node in model.graph.node:
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                field[i] = new if name == old else name
    for value in (*model.graph.output, *model.graph.value_info):
        value.name = new if value.name == old else value.name


def annotations(model: onnx.ModelProto, choose: random.Random) -> None:
    """Fields that hardly anything reads."""
    entry = model.graph.quantization_annotation.add(tensor_name=choose.choice(TEXTS))
    entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="nobody")
    if choose.random() < 0.5:
        model.training_info.add().algorithm.CopyFrom(model.graph)
    if choose.random() < 0.3:
        pick(choose, model.graph.node).overload = choose.choice(TEXTS)


# --- bodies


def bodies_of(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    found, waiting = [], [graph]
    while waiting:
        inner = [a.g for node in waiting.pop().node for a in node.attribute if a.HasField("g")]
        found += inner
        waiting += inner
    return found


def inside(model: onnx.ModelProto, choose: random.Random) -> None:
    """Any other damage, in a body of control flow or in a function."""
    body = pick(choose, [g for g in bodies_of(model.graph) if len(g.node)])
    function = pick(choose, [f for f in model.functions if len(f.node)])
    part = onnx.ModelProto()
    part.opset_import.extend(model.opset_import)
    if body is not None:
        part.graph.CopyFrom(body)
    elif function is not None:
        part.graph.node.extend(function.node)
    else:
        return
    choose.choice(MUTATIONS)(part, choose)
    if body is not None:
        body.CopyFrom(part.graph)
    elif function is not None:
        del function.node[:]
        function.node.extend(part.graph.node)


def body_somewhere(model: onnx.ModelProto, choose: random.Random) -> None:
    """A body where none belongs, or one that reads and writes what others do."""
    node = pick(choose, model.graph.node)
    names = [name for n in model.graph.node for name in (*n.input, *n.output) if name]
    inner = helper.make_node("Relu", [choose.choice(names)], [choose.choice(names)])
    body = helper.make_graph([inner], "b", [], [onnx.ValueInfoProto(name=choose.choice(names))])
    name = choose.choice(("body", "then_branch", "else_branch", "axis"))
    node.attribute.append(helper.make_attribute(name, body))


FORMS: tuple[Mutation, ...] = (
    long_chain, bomb, functions_of_functions, endless, many_attributes, empty_weight, strings,
    odd_type, contradiction, one_name, swap_names, annotations, inside, inside, inside,
    body_somewhere,
)  # fmt: skip
