"""Hostile models: refused with one message, whatever they try to reach or to break."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from mutations import deep_bytes
from onnx import TensorProto, helper, numpy_helper
from refusals import MODEL, Run, contents, refused, store, weights
from seeds import functions

from graphprune import api, external, memory, oracle, runtime, storage
from graphprune.errors import UsageError
from graphprune.memory import fitted
from graphprune.options import Options
from graphprune.storage import load, save

# --- external data


def beside(model: onnx.ModelProto, folder: Path) -> Path:
    """The model with all its weights in ``weights.bin``."""
    path = folder / "model.onnx"
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def entry(path: Path, key: str, value: str) -> Path:
    """One entry of every weight's external data is another."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for pair in tensor.external_data:
            if pair.key == key:
                pair.value = value
    return store(model, path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "in/../../secret", "", "C:\\x"])
def test_data_outside_the_folder(
    run: Run, chain: onnx.ModelProto, tmp_path: Path, location: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(100_000))
    folder = tmp_path / "inner"
    folder.mkdir()
    path = entry(beside(chain, folder), "location", location)
    refused(run, path, MODEL, "outside the model's folder")


def test_a_link_out_of_the_folder(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(100_000))
    folder = tmp_path / "inner"
    folder.mkdir()
    path = entry(beside(chain, folder), "location", "link")
    (folder / "link").symlink_to("../secret")
    refused(run, path, MODEL, "'link'", "outside the model's folder")


def test_a_model_that_is_itself_a_link(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    """Download caches keep links to one folder of files."""
    store_folder, seen = tmp_path / "blobs", tmp_path / "seen"
    store_folder.mkdir()
    seen.mkdir()
    beside(chain, store_folder)
    for name in ("model.onnx", "weights.bin"):
        (seen / name).symlink_to(store_folder / name)
    assert run("inspect", seen / "model.onnx", "--quiet").code == 0


def test_data_that_is_no_file(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    """A pipe would be waited on for ever."""
    path = entry(beside(chain, tmp_path), "location", "pipe")
    os.mkfifo(tmp_path / "pipe")
    refused(run, path, MODEL, "'pipe'")


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-4"), ("offset", "many"), ("offset", str(2**62)), ("length", "3")],
)
def test_data_beyond_the_file(
    run: Run, chain: onnx.ModelProto, tmp_path: Path, key: str, value: str
) -> None:
    refused(run, entry(beside(chain, tmp_path), key, value), MODEL, "weights.bin")


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


# --- weights that stay on disk


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight in a data file stays there, however small, and comes in parts."""
    monkeypatch.setattr(storage, "LAZY", 1)
    monkeypatch.setattr(external, "CHUNK", 100)


@pytest.mark.usefixtures("lazy")
def test_weights_on_disk_give_the_same_model(
    monkeypatch: pytest.MonkeyPatch, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    path = beside(chain, tmp_path)
    options: dict[str, Any] = {"flops": 0.5, "round_to": 1, "criterion": "l1", "repair": "none"}
    options |= {"measure": False, "cache": False}
    eager = api.prune(chain, **options)
    mapped = api.prune(path, output=tmp_path / "out.onnx", **options)
    assert mapped.plan.model_sha256 == eager.plan.model_sha256
    assert mapped.plan.kept == eager.plan.kept
    arrays = [{t.name: numpy_helper.to_array(t) for t in r.graph.initializer}
              for r in (eager.model, mapped.model, onnx.load(tmp_path / "out.onnx"))]  # fmt: skip
    for name, wanted in arrays[0].items():
        assert all(np.array_equal(other[name], wanted) for other in arrays[1:])
    first = contents(tmp_path)
    api.prune(path, output=tmp_path / "out.onnx", **options)
    assert contents(tmp_path) == first


@pytest.mark.usefixtures("lazy")
def test_a_cut_of_a_cut_reads_its_file_once_more(chain: onnx.ModelProto, tmp_path: Path) -> None:
    model = load(beside(chain, tmp_path))
    tensor = next(t for t in model.initializers.values() if len(t.dims) == 4)
    whole = external.array(tensor)
    first = np.arange(whole.shape[0]) % 3 > 0
    second = np.arange(first.sum()) % 2 > 0
    columns = np.arange(whole.shape[1]) > 0
    cut = external.sliced(external.sliced(tensor, {0: first}), {0: second, 1: columns})
    wanted = whole[first][second][:, columns]
    assert np.array_equal(external.array(cut), wanted)
    assert np.array_equal(np.concatenate(list(external.chunks(cut))), wanted)
    assert list(cut.dims) == list(wanted.shape)


@pytest.mark.usefixtures("lazy")
def test_mapped_weights_run_as_others_do(
    monkeypatch: pytest.MonkeyPatch, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    path = beside(chain, tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    wanted = runtime.opened(load(chain))({"x": x})[0]
    monkeypatch.setattr(runtime, "LARGE", 1)
    model = load(path)
    tensors = dict(model.initializers)
    name = next(n for n, t in tensors.items() if len(t.dims) == 4)
    every = np.ones(tensors[name].dims[0], bool)
    tensors[name] = external.sliced(tensors[name], {0: every})
    for each in (model, model.with_graph(model.nodes, tensors.values())):
        assert np.allclose(runtime.opened(each)({"x": x})[0], wanted, atol=1e-5)


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("operator", "axis"), [("MatMul", 0), ("Gemm", 0), ("Einsum", 0)])
def test_zeros_spare_weights_on_disk(operator: str, axis: int, tmp_path: Path) -> None:
    """What a weight is multiplied with is masked in its place, and the law holds as it did."""
    b = Builder(7)
    given = {"equation": "ij,jk->ik"} if operator == "Einsum" else {}
    hidden = b.add("Relu", b.add(operator, "x", b.weight(6, 8), **given))
    last = b.weight(8, 5)
    y = b.add(operator, hidden, last, **given)
    path = beside(b.model({"x": [2, 6]}, {y: [2, 5]}), tmp_path)
    prepared = api.prepare(path)
    model, analysis = prepared.original, prepared.analysis
    alive = np.ones(analysis.relations.total, bool)
    alive[analysis.relations.slots.tensors[last][axis].slots[:3]] = False
    masked = oracle.zeroed(model, analysis.shapes, analysis.coupling, alive)
    reads = next(node for node in masked.nodes if y in node.output).input
    assert reads[1] == last and reads[0] != hidden
    result = api.prune(path, flops=0.5, round_to=1, criterion="l1", repair="none", measure=False,
                       cache=False)  # fmt: skip
    assert result.verdict.passed


def test_no_room_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    model = load(beside(chain, tmp_path))
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UsageError, match="No space left"):
        save(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx.data").exists()


# --- models too large to run


def test_a_giant_is_planned_from_weights(
    monkeypatch: pytest.MonkeyPatch, run: Run, small: Path
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    ran = run(small, "--target-flops", "0.5", "--round-to", "1", "--no-cache")
    assert ran.code == 0, ran.err
    said = " ".join(ran.out.split())
    assert "too large to be run here" in said
    assert "planned by l1 (weights alone)" in said


def test_a_giant_and_what_would_run_it(
    monkeypatch: pytest.MonkeyPatch, chain: onnx.ModelProto
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    model = load(chain)
    with pytest.raises(UsageError, match="--search"):
        fitted(Options(flops=0.5, search=3), model)
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 40)
    assert fitted(Options(flops=0.5, search=3), model) == (Options(flops=0.5, search=3), ())


def test_a_giant_is_not_run_by_a_criterion_asked_for(
    monkeypatch: pytest.MonkeyPatch, run: Run, small: Path
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    ran = run(small, "--target-flops", "0.5", "--criterion", "obspa", "--repair", "none")
    assert ran.code == 2 and "too large to be run here" in ran.err


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
