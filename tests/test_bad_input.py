"""Bad input: one clear message, the right exit code, no partial file, the input untouched."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import helper, numpy_helper
from refusals import HALF, MODEL, USAGE, Run, contents, refused, spoil, store, weights

from graphprune import sound

# --- the file


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"<html>Not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(4096)],
    ids=["empty", "text", "html", "png", "zeros"],
)
def test_not_an_onnx_file(run: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(run, path, MODEL, "model.onnx")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated(run: Run, resnet: Path, tmp_path: Path, share: float) -> None:
    content = resnet.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: int(len(content) * share)])
    refused(run, path, MODEL, "model.onnx")


def test_no_such_file(run: Run, tmp_path: Path) -> None:
    refused(run, tmp_path / "nowhere.onnx", USAGE, "nowhere.onnx")


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_is_no_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(name, *HALF)
    assert (ran.code, ran.out) == (USAGE, "")
    assert contents(tmp_path) == {}


def test_an_unreadable_file(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(onnx, "load", denied)
    refused(run, small, USAGE, "model.onnx", "Permission denied")


def test_missing_external_data(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    refused(run, path, MODEL, "weights.bin", "model.onnx")


def test_truncated_external_data(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:100])
    refused(run, path, MODEL)


def test_external_data_outside_the_folder(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    """A model may not read other files of the machine."""
    (tmp_path / "secret").write_bytes(bytes(100_000))
    folder = tmp_path / "inner"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(chain, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (folder / "weights.bin").unlink()
    refused(run, store(model, path), MODEL, "../secret")


def test_external_data_round_trip(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(chain, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = contents(tmp_path)
    assert run(path, *HALF, "--quiet", "--no-cache", "-o", out).code == 0
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"out.onnx", "out.onnx.data"}
    assert run("compare", out, out, "--quiet").code == 0


def test_result_never_overwrites_the_inputs_data(
    run: Run, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    """The input was renamed after it was saved: its data still bears the old name."""
    named = tmp_path / "model.onnx"
    onnx.save(
        chain, named, save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    original = named.rename(tmp_path / "original.onnx")
    before = contents(tmp_path)
    run(original, *HALF, "--quiet", "-o", named)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


# --- the graph


def test_empty_graph(run: Run, tmp_path: Path) -> None:
    empty = helper.make_model(helper.make_graph([], "g", [], []))
    refused(run, store(empty, tmp_path / "model.onnx"), MODEL, "empty", "model.onnx")


def test_no_outputs(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    del chain.graph.output[:]
    err = refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "output")
    assert "onnxruntime_src" not in err  # not ONNX Runtime's inner troubles


def test_cyclic_graph(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    nodes = chain.graph.node
    nodes[1].input[0] = nodes[2].output[0]
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "cycle", "node")


def test_undefined_input(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    chain.graph.node[2].input[0] = "nobody"
    name = chain.graph.node[2].name
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "nobody", name)


def test_undefined_output(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    chain.graph.output[0].name = "nobody"
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "nobody")


def test_tensor_written_twice(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    twin = chain.graph.node.add()
    twin.CopyFrom(chain.graph.node[1])
    twin.name = "twin"
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "twice", twin.output[0])


def test_weight_written_by_a_node(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    name = chain.graph.initializer[-1].name
    chain.graph.node[1].output[0] = chain.graph.node[2].input[0] = name
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, name)


def test_weight_stored_twice(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    """Which of the two is meant? ONNX forbids it, and readers disagree."""
    first = weights(chain)[0]
    twin = chain.graph.initializer.add()
    twin.CopyFrom(first)
    spoil(twin, 7.0)
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, first.name)


def test_weight_of_another_size(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    tensor = weights(chain)[1]
    tensor.dims[0] = 99
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, tensor.name)


def test_nan_weights(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    tensor = weights(chain)[1]
    spoil(tensor, np.nan)
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "NaN", tensor.name)


def test_nan_in_a_constant_node(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    tensor = weights(chain)[1]
    spoil(tensor, np.nan)
    node = helper.make_node("Constant", [], [tensor.name], value=tensor)
    chain.graph.node.insert(0, node)
    chain.graph.initializer.remove(tensor)
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "NaN", node.output[0])


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("position", [1, 2, 4])
def test_vectors_of_another_length_or_of_text(
    run: Run, tmp_path: Path, position: int, text: bool
) -> None:
    """Of a BatchNormalization and of a convolution's bias; nothing is computed with them."""
    b = Builder()
    y = b.conv(b.norm(b.conv("x", 3, 8), 8), 8, 4)
    model = b.model({"x": [1, 3, 6, 6]}, {y: [1, 4, 6, 6]})
    name = model.graph.node[0 if position == 2 else 1].input[position]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    wrong = np.array(["a"] * 8, object) if text else np.ones(3, np.float32)
    tensor.CopyFrom(numpy_helper.from_array(wrong, name))
    refused(run, store(model, tmp_path / "model.onnx"), MODEL)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_infinities_are_no_nan(dtype: Any) -> None:
    values = np.array([[0, -0.0, 1, -3], [np.inf, -np.inf, 1e-3, 5]]).astype(dtype)
    assert not sound.has_nan(values)
    assert not sound.has_nan(values.T)
    for broken in (np.nan, -np.nan):
        values[0, 1] = broken
        assert sound.has_nan(values)
        assert sound.has_nan(values.T)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_nan_of_any_type(run: Run, tmp_path: Path, dtype: Any) -> None:
    b = Builder()
    broken = b.constant(np.array([[1, np.nan, 2, 3]]).astype(dtype), "broken")
    hidden = b.add("MatMul", "x", b.add("Cast", broken, to=onnx.TensorProto.FLOAT))
    y = b.add("MatMul", hidden, b.weight(4, 5))
    model = b.model({"x": [1, 1]}, {y: [1, 5]})
    refused(run, store(model, tmp_path / "model.onnx"), MODEL, "NaN", "broken")


def test_outputs_that_prove_nothing(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    """An infinite weight turns every output into NaN: any cut would look right."""
    tensor = weights(chain)[1]
    spoil(tensor, np.inf)
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL)


@pytest.mark.parametrize("place", ["inside", "at the end"])
def test_custom_operator(run: Run, chain: onnx.ModelProto, tmp_path: Path, place: str) -> None:
    """ONNX Runtime refuses it, wherever it stands: nothing can be proven."""
    chain.opset_import.append(helper.make_opsetid("my.domain", 1))
    node = next(n for n in chain.graph.node if n.op_type == "Relu")
    if place == "at the end":
        node = chain.graph.node.add()
        node.input.append(chain.graph.output[0].name)
        node.output.append("final")
        chain.graph.output[0].name = "final"
    node.op_type, node.domain, node.name = "Mystery", "my.domain", "odd"
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "Mystery")


@pytest.mark.parametrize("version", [0, 99])
def test_unknown_opset(run: Run, chain: onnx.ModelProto, tmp_path: Path, version: int) -> None:
    chain.opset_import[0].version = version
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "opset")


def test_no_opset(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    del chain.opset_import[:]
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, "opset")


def test_a_conv_with_a_wild_group(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    for attribute in chain.graph.node[2].attribute:
        if attribute.name == "group":
            attribute.i = -7
    refused(run, store(chain, tmp_path / "model.onnx"), MODEL, chain.graph.node[2].name)
