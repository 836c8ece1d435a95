"""What a damaged or hostile model may look like: one function per kind of damage.

Each takes a model and a source of randomness and edits in place.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Mutation = Callable[[onnx.ModelProto, random.Random], None]
SIZES = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
NUMBERS = (0, 1, -1, 2, 3, -2, 64, 2**31, 2**62, 2**63 - 1, -(2**63))
TEXTS = (
    "",
    "x",
    "a\nb",
    "ü→漢\U0001f600",
    "\x00",
    "../up",
    "/abs",
    "n" * (1 << 20),
    " ",
    "%s{}[red]",
)


def pick(choose: random.Random, items: Any) -> Any:
    """One of the items, ``None`` where there are none."""
    items = list(items)
    return choose.choice(items) if items else None


# --- the graph


def cycle(model: onnx.ModelProto, choose: random.Random) -> None:
    nodes = model.graph.node
    i = choose.randrange(len(nodes))
    later = pick(choose, [n for n in list(nodes)[i:] if n.output])
    if nodes[i].input and later is not None:
        nodes[i].input[choose.randrange(len(nodes[i].input))] = later.output[0]


def shuffle(model: onnx.ModelProto, choose: random.Random) -> None:
    nodes = list(model.graph.node)
    choose.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def drop_node(model: onnx.ModelProto, choose: random.Random) -> None:
    del model.graph.node[choose.randrange(len(model.graph.node))]


def twin_node(model: onnx.ModelProto, choose: random.Random) -> None:
    model.graph.node.append(pick(choose, model.graph.node))


def rename_tensor(model: onnx.ModelProto, choose: random.Random) -> None:
    """Everywhere: the model stays as sound as the name."""
    graph = model.graph
    names = [n for node in graph.node for n in (*node.input, *node.output) if n]
    old, new = pick(choose, names), choose.choice(TEXTS)
    for node in graph.node:
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                field[i] = new if name == old else name
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = new if value.name == old else value.name


def rename_once(model: onnx.ModelProto, choose: random.Random) -> None:
    graph = model.graph
    thing = pick(choose, (*graph.input, *graph.output, *graph.initializer, *graph.node))
    thing.name = choose.choice((*TEXTS, *(n for node in graph.node for n in node.output)))


def rewire(model: onnx.ModelProto, choose: random.Random) -> None:
    names = [n for node in model.graph.node for n in (*node.input, *node.output)]
    node = pick(choose, model.graph.node)
    field = choose.choice((node.input, node.output))
    if len(field):
        field[choose.randrange(len(field))] = choose.choice((*names, "", "nobody"))


def arity(model: onnx.ModelProto, choose: random.Random) -> None:
    node = pick(choose, model.graph.node)
    field = choose.choice((node.input, node.output))
    if choose.random() < 0.5 and len(field):
        del field[choose.randrange(len(field)) :]
    else:
        field.extend([pick(choose, field) or "extra"] * choose.choice((1, 2, 50)))


def operator(model: onnx.ModelProto, choose: random.Random) -> None:
    from onnx import defs

    node = pick(choose, model.graph.node)
    if choose.random() < 0.7:
        node.op_type = choose.choice(sorted({s.name for s in defs.get_all_schemas()}))
    elif choose.random() < 0.5:
        node.op_type = choose.choice(TEXTS)
    else:
        node.domain = choose.choice(("ai.onnx", "com.microsoft", "ai.onnx.ml", "my.own", *TEXTS))


def interface(model: onnx.ModelProto, choose: random.Random) -> None:
    side = choose.choice((model.graph.input, model.graph.output))
    kind = choose.randrange(5)
    if kind == 0:
        del side[:]
    elif kind == 1 and len(side):
        side.add().CopyFrom(side[0])
    elif kind == 2 and len(side):
        side[0].ClearField("type")
    elif kind == 3 and len(side):
        side[0].type.tensor_type.elem_type = choose.choice((0, 1, 7, 8, 16, 99, -1))
    else:
        names = [t.name for t in model.graph.initializer] + [v.name for v in model.graph.input]
        model.graph.output.add().name = choose.choice((*names, "nobody"))


def input_that_is_stored(model: onnx.ModelProto, choose: random.Random) -> None:
    tensor = pick(choose, model.graph.initializer)
    if tensor is not None:
        dims = list(tensor.dims) if choose.random() < 0.7 else [choose.choice(SIZES)]
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, dims)
        model.graph.input.append(value)


def declared_size(model: onnx.ModelProto, choose: random.Random) -> None:
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    dim = pick(choose, [d for v in values for d in v.type.tensor_type.shape.dim])
    if dim is None:
        return
    if choose.random() < 0.7:
        dim.dim_value = choose.choice(SIZES)
    else:
        dim.dim_param = choose.choice(TEXTS)


# --- weights


def weight_size(model: onnx.ModelProto, choose: random.Random) -> None:
    tensor = pick(choose, [t for t in model.graph.initializer if t.dims])
    if tensor is not None:
        i = choose.randrange(len(tensor.dims))
        tensor.dims[i] = choose.choice((*SIZES, tensor.dims[i] + 1, tensor.dims[i] - 1))


def weight_rank(model: onnx.ModelProto, choose: random.Random) -> None:
    tensor = pick(choose, model.graph.initializer)
    if tensor is None:
        return
    if choose.random() < 0.5:
        tensor.CopyFrom(numpy_helper.from_array(np.float32(1), tensor.name))
    else:
        tensor.dims.extend([1] * choose.choice((1, 1, 70)))


def weight_data(model: onnx.ModelProto, choose: random.Random) -> None:
    tensor = pick(choose, model.graph.initializer)
    if tensor is None:
        return
    kind = choose.randrange(5)
    if kind == 0:
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    elif kind == 1:
        tensor.raw_data = tensor.raw_data + b"\x01" * choose.choice((1, 4, 1000))
    elif kind == 2:
        tensor.ClearField("raw_data")
    elif kind == 3:
        tensor.float_data.extend([1.0] * 3)
    else:
        tensor.ClearField("raw_data")
        tensor.string_data.extend([b"a", b"\xff"])


def weight_type(model: onnx.ModelProto, choose: random.Random) -> None:
    tensor = pick(choose, model.graph.initializer)
    if tensor is not None:
        tensor.data_type = choose.choice((*range(27), 99, -1, 2**31 - 1))


def weight_type_whole(model: onnx.ModelProto, choose: random.Random) -> None:
    """The data fits the new type."""
    tensor = pick(choose, model.graph.initializer)
    if tensor is not None and tensor.data_type == TensorProto.FLOAT:
        kind = choose.choice((np.float16, np.float64, np.int32, np.int64, np.uint8, np.bool_))
        array = numpy_helper.to_array(tensor).astype(kind)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def weight_values(model: onnx.ModelProto, choose: random.Random) -> None:
    tensor = pick(choose, [t for t in model.graph.initializer if t.data_type == 1])
    if tensor is None:
        return
    array = numpy_helper.to_array(tensor).copy()
    value = choose.choice((np.nan, np.inf, -np.inf, 0.0, 1e-45, 3e38, -1.0))
    if choose.random() < 0.5:
        array[...] = value
    elif array.size:
        array.flat[choose.randrange(array.size)] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def small_integers(model: onnx.ModelProto, choose: random.Random) -> None:
    """Shapes, axes and indices out of range."""
    tensor = pick(choose, [t for t in model.graph.initializer if t.data_type in (6, 7)])
    if tensor is None:
        return
    array = numpy_helper.to_array(tensor).copy()
    if array.size:
        number = choose.choice(NUMBERS)
        array.flat[choose.randrange(array.size)] = np.array(number).astype(array.dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def weight_twice(model: onnx.ModelProto, choose: random.Random) -> None:
    tensor = pick(choose, model.graph.initializer)
    if tensor is not None:
        model.graph.initializer.append(tensor)


def weight_gone(model: onnx.ModelProto, choose: random.Random) -> None:
    if len(model.graph.initializer):
        del model.graph.initializer[choose.randrange(len(model.graph.initializer))]


def sparse(model: onnx.ModelProto, choose: random.Random) -> None:
    tensor = pick(choose, model.graph.initializer)
    if tensor is None:
        return
    array = numpy_helper.to_array(tensor)
    places = np.flatnonzero(array)[:5].astype(np.int64)
    if choose.random() < 0.5 and len(places):
        places[0] = choose.choice(NUMBERS)
    entry = model.graph.sparse_initializer.add()
    entry.values.CopyFrom(numpy_helper.from_array(array.reshape(-1)[: len(places)], tensor.name))
    entry.indices.CopyFrom(numpy_helper.from_array(places, "places"))
    entry.dims.extend(array.shape)
    if choose.random() < 0.7:
        model.graph.initializer.remove(tensor)


# --- attributes


def attribute_value(model: onnx.ModelProto, choose: random.Random) -> None:
    attribute = pick(choose, [a for n in model.graph.node for a in n.attribute])
    if attribute is None:
        return
    if attribute.ints:
        attribute.ints[choose.randrange(len(attribute.ints))] = choose.choice(NUMBERS)
        if choose.random() < 0.3:
            attribute.ints.extend([1] * choose.choice((1, 100)))
        elif choose.random() < 0.3:
            del attribute.ints[:]
    elif attribute.type == AttributeProto.STRING:
        attribute.s = choose.choice((b"", b"\xff\xfe", b"SAME_UPPER", b"reflect", b"x" * 1000))
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = choose.choice((0.0, -1.0, float("nan"), float("inf")))
    else:
        attribute.i = choose.choice(NUMBERS)


def attribute_type(model: onnx.ModelProto, choose: random.Random) -> None:
    attribute = pick(choose, [a for n in model.graph.node for a in n.attribute])
    if attribute is None:
        return
    if choose.random() < 0.4:
        attribute.type = choose.randrange(15)
        return
    name = attribute.name
    other = choose.choice((1, 2.5, "text", [1, 2], [0.5], ["a"], TensorProto()))
    attribute.CopyFrom(helper.make_attribute(name, other))


def attribute_gone(model: onnx.ModelProto, choose: random.Random) -> None:
    node = pick(choose, [n for n in model.graph.node if n.attribute])
    if node is not None:
        del node.attribute[choose.randrange(len(node.attribute))]


def attribute_more(model: onnx.ModelProto, choose: random.Random) -> None:
    node = pick(choose, model.graph.node)
    known = [a.name for a in node.attribute]
    name = choose.choice((*known, "axis", "group", "keepdims", "unheard_of", ""))
    node.attribute.append(helper.make_attribute(name or "x", choose.choice(NUMBERS)))
    node.attribute[-1].name = name
    if choose.random() < 0.2:
        node.attribute[-1].ref_attr_name = "outer"


# --- versions and functions


def opsets(model: onnx.ModelProto, choose: random.Random) -> None:
    kind = choose.randrange(5)
    if kind == 0:
        del model.opset_import[:]
    elif kind == 1 and len(model.opset_import):
        model.opset_import.add().CopyFrom(model.opset_import[0])
        model.opset_import[-1].version = choose.choice((1, 9, 17, 21))
    elif kind == 2:
        model.opset_import.add(domain=choose.choice(TEXTS), version=choose.choice(NUMBERS))
    elif kind == 3:
        model.ir_version = choose.choice((0, 1, 3, 99, 2**62, -1))
    elif len(model.opset_import):
        model.opset_import[0].version = choose.choice((0, -1, 1, 5, 7, 30, 999, 2**62))


def function_of_itself(model: onnx.ModelProto, choose: random.Random) -> None:
    """A function that calls itself, at once or by way of another."""
    calls = ("f", "f") if choose.random() < 0.5 else ("g", "f")
    opset = [helper.make_opsetid("loop", 1)]
    for name, called in zip(("f", "g"), calls, strict=True):
        inner = [helper.make_node(called, ["x"], ["y"], domain="loop")]
        function = helper.make_function("loop", name, ["x"], ["y"], inner, opset)
        model.functions.append(function)
    model.opset_import.append(opset[0])
    node = pick(choose, model.graph.node)
    node.op_type, node.domain = "f", "loop"
    del node.attribute[:]


def function_damage(model: onnx.ModelProto, choose: random.Random) -> None:
    function = pick(choose, model.functions)
    if function is None:
        return
    kind = choose.randrange(5)
    if kind == 0:
        del function.opset_import[:]
    elif kind == 1:
        function.node[0].input[0] = "nobody"
    elif kind == 2:
        del function.output[:]
    elif kind == 3:
        model.functions.append(function)
    else:
        function.name = choose.choice(TEXTS)


def deep(model: onnx.ModelProto, choose: random.Random) -> None:
    """If in If in If …, around one of the graph's own tensors."""
    node = pick(choose, [n for n in model.graph.node if n.output and n.output[0]])
    if node is None:
        return
    seen = node.output[0]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "deep_flag"))
    inside = helper.make_node("Identity", [seen], ["deep_0"])
    end = onnx.ValueInfoProto(name="deep_0")
    body = helper.make_graph([inside], "b", [], [end])
    for level in range(1, choose.choice((2, 5, 20))):
        name = f"deep_{level}"
        branches = {"then_branch": body} | ({"else_branch": body} if level < 5 else {})
        outer = helper.make_node("If", ["deep_flag"], [name], **branches)
        body = helper.make_graph([outer], "b", [], [onnx.ValueInfoProto(name=name)])
    last = body.node[0]
    model.graph.node.append(last)
    if model.graph.output and choose.random() < 0.5:
        model.graph.output.add().name = last.output[0]


def metadata(model: onnx.ModelProto, choose: random.Random) -> None:
    """Text where nothing reads any."""
    text = choose.choice(TEXTS)
    model.producer_name = text
    model.doc_string = text
    for _ in range(2):
        model.metadata_props.add(key=text, value=text)


MUTATIONS: tuple[Mutation, ...] = (
    cycle, shuffle, drop_node, twin_node, rename_tensor, rename_once, rewire, arity, operator,
    interface, input_that_is_stored, declared_size, weight_size, weight_rank, weight_data,
    weight_type, weight_type_whole, weight_values, small_integers, weight_twice, weight_gone,
    sparse, attribute_value, attribute_type, attribute_gone, attribute_more, opsets,
    function_of_itself, function_damage, deep, metadata,
)  # fmt: skip
