"""Hostile models: refused with one message, whatever they try to reach or to break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from file_mutations import deep_bytes
from graphs import Builder
from onnx import TensorProto, helper, numpy_helper
from refusals import MODEL, Run, contents, refused, store, weights
from seeds import functions

from graphprune import api, runtime
from graphprune.storage import load

# --- sizes


@pytest.mark.parametrize("dims", [[-1], [2**62], [2**40, 2**40], [-(2**63)], [0, 3]])
def test_a_weight_of_a_wild_shape(
    run: Run, chain: onnx.ModelProto, tmp_path: Path, dims: list[int]
) -> None:
    tensor = weights(chain)[0]
    tensor.dims[:] = dims
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, tensor.name)


def test_a_huge_input(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    chain.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**62
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "larger than memory", "'x'")


def test_a_long_chain(tmp_path: Path) -> None:
    """No recursion, and no cost that grows with the square of the depth."""
    b = Builder(opset=17)
    x = b.add("MatMul", "x", b.weight(4, 8))
    for _ in range(20_000):
        x = b.add("Relu", x)
    y = b.add("MatMul", x, b.weight(8, 3))
    ends = [[helper.make_tensor_value_info(n, 1, [1, s])] for n, s in (("x", 4), (y, 3))]
    graph = helper.make_graph(b.nodes, "g", *ends, b.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = api.prune(model, flops=0.5, criterion="l1", repair="none", round_to=1,
                       verify=False, measure=False)  # fmt: skip
    assert result.after.macs <= result.before.macs / 2


@pytest.mark.parametrize("levels", [5, 200, 5000])
def test_bodies_in_bodies(run: Run, small: Path, levels: int) -> None:
    small.write_bytes(small.read_bytes() + deep_bytes(levels))
    ran = run("inspect", small)
    assert ran.code == MODEL
    assert len([line for line in ran.err.splitlines() if "error:" in line]) == 1


# --- the graph


@pytest.mark.parametrize("way", ["at once", "by way of another"])
def test_a_function_that_calls_itself(run: Run, tmp_path: Path, way: str) -> None:
    model = functions()
    model.functions[0].node[0].op_type = "act" if way == "at once" else "other"
    model.functions[0].node[0].domain = "local"
    model.functions[0].opset_import.append(helper.make_opsetid("local", 1))
    if way != "at once":
        model.functions.append(model.functions[0])
        model.functions[1].name, model.functions[1].node[0].op_type = "other", "act"
    refused(run, store(model, tmp_path / "model.onnx"), MODEL, "functions")


@pytest.mark.parametrize("depth", [30, 90])
def test_functions_that_double(run: Run, tmp_path: Path, depth: int) -> None:
    """A few kilobytes that stand for more operators than any memory holds."""
    model = functions()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    for i in range(depth):
        called = f"f{i + 1}" if i < depth - 1 else "act"
        inner = [helper.make_node(called, [a], [b], domain="local") for a, b in ("xm", "my")]
        model.functions.append(helper.make_function("local", f"f{i}", ["x"], ["y"], inner, opsets))
    next(n for n in model.graph.node if n.domain == "local").op_type = "f0"
    refused(run, store(model, tmp_path / "model.onnx"), MODEL, "local functions", "or more")


def test_text_where_sizes_belong(run: Run, tmp_path: Path) -> None:
    b = Builder()
    sizes = b.ints(2, 4)
    y = b.add("MatMul", b.add("Reshape", "x", sizes), b.weight(4, 3))
    model = b.model({"x": [4, 2]}, {y: [2, 3]})
    text = np.array(["x", ""], object)
    next(t for t in model.graph.initializer if t.name == sizes).CopyFrom(
        numpy_helper.from_array(text, sizes)
    )
    refused(run, store(model, tmp_path / "model.onnx"), MODEL)


@pytest.mark.parametrize("sizes", [[2**40], [2**62, 4], [-(2**40)]])
def test_a_constant_beyond_memory(run: Run, tmp_path: Path, sizes: list[int]) -> None:
    b = Builder()
    filled = b.add("ConstantOfShape", b.ints(*sizes))
    y = b.add("MatMul", b.add("Add", "x", b.add("ReduceSum", filled, keepdims=0)), b.weight(4, 3))
    ends = [[helper.make_tensor_value_info(n, 1, [2, s])] for n, s in (("x", 4), (y, 3))]
    graph = helper.make_graph(b.nodes, "g", *ends, b.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    refused(run, store(model, tmp_path / "model.onnx"), MODEL)


def test_an_axis_out_of_range(run: Run, tmp_path: Path) -> None:
    """ONNX's own shape inference reads beyond its end here."""
    b = Builder()
    y = b.add("LayerNormalization", "x", b.weight(4))
    model = b.model({"x": [2, 4]}, {y: [2, 4]})
    model.graph.node[0].attribute.append(helper.make_attribute("axis", 2**63 - 1))
    refused(run, store(model, tmp_path / "model.onnx"), MODEL, "axis", "out of range")


@pytest.mark.parametrize(
    "attribute",
    [
        helper.make_attribute("unheard_of", 1),
        helper.make_attribute("group", "two"),
        helper.make_attribute("pads", 1.5),
    ],
    ids=lambda a: a.name,
)
def test_a_wrong_attribute(
    run: Run, chain: onnx.ModelProto, tmp_path: Path, attribute: onnx.AttributeProto
) -> None:
    node = chain.graph.node[0]
    for old in [a for a in node.attribute if a.name == attribute.name]:
        node.attribute.remove(old)
    node.attribute.append(attribute)
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, node.name)


def test_an_attribute_given_twice(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    node = chain.graph.node[0]
    node.attribute.append(node.attribute[0])
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "twice", node.name)


def test_opsets_that_contradict_each_other(
    run: Run, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    chain.opset_import.append(helper.make_opsetid("", 9))
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "opset")


@pytest.mark.parametrize("version", [0, -1, 2**62])
def test_a_wild_ir_version(run: Run, chain: onnx.ModelProto, tmp_path: Path, version: int) -> None:
    chain.ir_version = version
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "IR version")


@pytest.mark.parametrize("name", ["a\nb", "漢\U0001f600", "../../etc", "n" * (1 << 20), "[red]%s"])
def test_odd_names_are_names(run: Run, chain: onnx.ModelProto, tmp_path: Path, name: str) -> None:
    graph = chain.graph
    old = graph.node[0].output[0]
    for node in graph.node:
        for names in (node.input, node.output):
            for i, each in enumerate(names):
                names[i] = name if each == old else each
    path = store(chain, tmp_path / "model.onnx")
    before = contents(tmp_path)
    options = ("--target-flops", "0.5", "--round-to", "1", "--no-cache", "--quiet", "--fast")
    assert run(path, *options, "--no-measure", "-o", tmp_path / "out.onnx").code == 0
    after = contents(tmp_path)
    assert {n: after[n] for n in before} == before
    assert set(after) - set(before) == {"out.onnx"}


def test_a_budget_of_what_is_not_there(run: Run, tmp_path: Path) -> None:
    """No multiply-accumulates at all."""
    b = Builder()
    y = b.add("Relu", "x")
    refused(run, store(b.model({"x": [1, 4]}, {y: [1, 4]}), tmp_path / "m.onnx"), 8, "pruned")


# --- sparse weights


def sparse(model: onnx.ModelProto, tensor: TensorProto, places: Any) -> onnx.ModelProto:
    """The model with one weight stored sparsely, its values at ``places``."""
    array = numpy_helper.to_array(tensor)
    values = array.reshape(-1)[: len(places)]
    new = model.graph.sparse_initializer.add()
    new.values.CopyFrom(numpy_helper.from_array(values, tensor.name))
    new.indices.CopyFrom(numpy_helper.from_array(np.array(places, np.int64), "places"))
    new.dims.extend(array.shape)
    model.graph.initializer.remove(tensor)
    return model


@pytest.mark.parametrize("places", [[0, 5, 9], [[0, 0, 0, 0], [1, 2, 2, 2]]], ids=["flat", "pairs"])
def test_sparse_weights_become_plain(chain: onnx.ModelProto, places: Any) -> None:
    tensor = onnx.TensorProto()
    tensor.CopyFrom(weights(chain)[0])
    before = numpy_helper.to_array(tensor)
    wanted = np.zeros_like(before)
    where = np.array(places)
    flat = where if where.ndim == 1 else np.ravel_multi_index(tuple(where.T), before.shape)
    wanted.reshape(-1)[flat] = before.reshape(-1)[: len(places)]
    model = load(sparse(chain, weights(chain)[0], places))
    assert np.array_equal(model.array(tensor.name), wanted)


def test_sparse_weights_outside_themselves(
    run: Run, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    name = weights(chain)[0].name
    model = sparse(chain, weights(chain)[0], [0, 2**40])
    refused(run, store(model, tmp_path / "model.onnx"), MODEL, name)


def test_sparse_weights_of_text(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    name = weights(chain)[0].name
    model = sparse(chain, weights(chain)[0], [0, 1])
    text = numpy_helper.from_array(np.array(["a", "b"], dtype=object), name)
    model.graph.sparse_initializer[0].values.CopyFrom(text)
    refused(run, store(model, tmp_path / "model.onnx"), MODEL, name)


def test_pads_of_another_rank(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    node = next(node for node in chain.graph.node if node.op_type == "Conv")
    for attribute in [a for a in node.attribute if a.name == "pads"]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute("pads", [1, 1]))
    refused(run, store(chain, tmp_path / "m.onnx"), 3)


# --- what never ends


ENDLESS = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2,4] x) => (float[2,3] y)
<int64 trips = {9223372036854775807}, bool yes = {1}>
{
  h = MatMul (x, w)
  l = Loop (trips, yes, h) <body = b (int64 i, bool c, float[2,8] s) => (bool d, float[2,8] t) {
    d = Identity (c)
    t = Relu (s)
  }>
  y = MatMul (l, v)
}
"""


@pytest.mark.parametrize("more", [(), ("--no-verify",)])
def test_an_endless_loop_is_stopped(
    monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """By whatever runs it first."""
    monkeypatch.setattr(runtime, "RUN_LIMIT", 0.5)
    model = onnx.parser.parse_model(ENDLESS)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 8)), ("v", (8, 3))):
        array = rng.standard_normal(shape, dtype=np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    path = store(model, tmp_path / "model.onnx")
    options = ("--target-flops", "0.5", "--round-to", "1", "--no-cache", *more)
    refused(run, path, MODEL, "was stopped", extra=options)


# --- text and constants that cannot be had


def test_text_that_is_not_utf8(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    chain.producer_name = "producer"
    path = tmp_path / "model.onnx"
    path.write_bytes(chain.SerializeToString().replace(b"producer", b"\xff\xfe\xfd\xfcuced"))
    refused(run, path, MODEL, "UTF-8")


def test_a_computed_weight_beyond_memory(run: Run, tmp_path: Path) -> None:
    """The scale of a BatchNormalization is computed by the graph: 2^60 ones."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4,2,2] x) => (y)
          <float[1] one = {1.0}, int64[1] many = {1152921504606846976},
           float[4] z = {0.0, 0.0, 0.0, 0.0}, float[4] v = {1.0, 1.0, 1.0, 1.0}> {
          s = Tile(one, many)
          y = BatchNormalization(x, s, z, z, v)
        }"""
    )
    ran = run(store(model, tmp_path / "model.onnx"), "--target-flops", 0.5)
    assert ran.code in (3, 8)
    assert "Traceback" not in ran.err
