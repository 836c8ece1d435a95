"""Latency: pieces that run alone, forms, tables, predictions; times come from stand-in devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Builder, attention, random_cnn
from hypothesis import given
from hypothesis import strategies as st
from latency_forms import ByWeights, analysed, repeated

from graphprune.analysis import Analysis
from graphprune.coupling import Mask
from graphprune.errors import ModelError, UsageError
from graphprune.latency.device import OnnxRuntime
from graphprune.latency.forms import form_of
from graphprune.latency.gauge import gauges
from graphprune.latency.micro import Micro, micro
from graphprune.latency.pieces import blocked, split
from graphprune.latency.predict import Latency, nodes_around
from graphprune.profiling import kernels
from graphprune.tables import Table, interpolated, keep, read
from graphprune.targets import Target, as_toml, choose

FREE = Target("free")
CONTROL = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1,8] x, bool which) => (float[1,4] y) <float[8,16] w, float[16,4] v> {
  h = MatMul(x, w)
  r = If (which) <then_branch = t () => (float[1,16] a) { a = Relu(h) },
                  else_branch = e () => (float[1,16] b) { b = Abs(h) }>
  y = MatMul(r, v)
}"""
LSTM = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[5,1,8] x) => (float[5,4] y)
  <float[1,64,8] w, float[1,64,16] r, float[16,4] v> {
  h, hn, cn = LSTM<hidden_size=16>(x, w, r)
  s = Constant<value_ints = [5, 16]>()
  f = Reshape(h, s)
  y = MatMul(f, v)
}"""


def with_weights(text: str) -> onnx.ModelProto:
    """The model with random values for what its text only declares."""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for info in model.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, info.name))
    del model.graph.value_info[:]
    return model


def halved(analysis: Analysis) -> Mask:
    removed = analysis.nothing_removed
    for group in analysis.coupling.groups:
        removed[group.units[(len(group) + 1) // 2 :]] = True
    return removed


MODELS = {
    "residual": repeated,
    "attention": attention,
    "random": lambda: random_cnn(3),
    "branches": lambda: with_weights(CONTROL),
    "recurrent": lambda: with_weights(LSTM),
    "gauge": lambda: next(gauges())[1],
}


@pytest.fixture(params=sorted(MODELS))
def analysis(request: pytest.FixtureRequest) -> Analysis:
    return analysed(MODELS[request.param]())


def test_every_node_is_in_one_piece(analysis: Analysis) -> None:
    model = analysis.model
    found = [i for piece in split(analysis) for i in piece.nodes]
    constant = {
        i for i, n in enumerate(model.nodes) if n.output and set(n.output) <= model.constant_names
    }
    assert sorted(found) == [i for i in range(len(model.nodes)) if i not in constant]


@pytest.mark.parametrize("cut", [False, True])
def test_every_piece_runs_alone(analysis: Analysis, cut: bool) -> None:
    removed = halved(analysis) if cut else analysis.nothing_removed
    alive = analysis.coupling.alive(removed)
    near = blocked(analysis)
    for piece in split(analysis):
        made = micro(analysis, piece, near, alive)
        assert kernels(made.model, made.feeds, rounds=1)


def test_equal_blocks_are_of_one_form() -> None:
    analysis = analysed(repeated())
    near = blocked(analysis)
    forms = [form_of(analysis, piece, near).text for piece in split(analysis)]
    assert len(forms) == 8  # stem, three blocks of two, classifier
    assert len(set(forms)) == 5  # the last block goes on into the pooling
    assert forms[1] == forms[3] == forms[5]
    assert "t1=float[b,a,3,3]" in forms[1] or "t1=float[a,b,3,3]" in forms[1]


def test_a_form_says_what_follows_from_the_counts() -> None:
    b = Builder(2)
    x = b.add("Concat", b.conv("x", 3, 4), b.conv("x", 3, 6), axis=1)
    y = b.conv(x, 10, 5)
    analysis = analysed(b.model({"x": [1, 3, 8, 8]}, {y: [1, 5, 8, 8]}))
    texts = [form_of(analysis, p, blocked(analysis)).text for p in split(analysis)]
    assert any("float[5,a,3,3]" in text for text in texts)  # ten channels of two groups: one knob
    assert any("a+b" in text for text in texts)


def test_the_sum_of_pieces_is_the_model() -> None:
    analysis = analysed(repeated())
    device = ByWeights()
    latency = Latency(analysis, FREE, Table(), device)
    removed = halved(analysis)
    whole = float(sum(np.prod(t.dims) for t in analysis.model.initializers.values()))
    assert latency(analysis.nothing_removed) == pytest.approx(whole / 1e3)
    parts = analysis.cost.of(removed).params
    assert latency(removed) == pytest.approx(parts / 1e3)


def test_what_was_timed_is_not_timed_again() -> None:
    analysis = analysed(repeated())
    device = ByWeights()
    latency = Latency(analysis, FREE, Table(), device)
    latency(analysis.nothing_removed)
    asked = device.asked
    latency(analysis.nothing_removed)
    assert device.asked == asked == 5
    again = Latency(analysed(repeated()), FREE, latency.table, device)
    again(analysis.nothing_removed)
    assert device.asked == asked


def test_a_piece_that_does_not_run_alone_is_kept_in_mind() -> None:
    class Broken(ByWeights):
        def piece(self, micro: Micro) -> float:
            raise ModelError("it does not run")

    latency = Latency(analysed(repeated()), FREE, Table(), Broken())
    latency(latency.analysis.nothing_removed)
    assert set(latency.untimed.values()) == {"it does not run"}
    assert latency.untimed_share == pytest.approx(1.0)
    assert not latency.table.entries  # nothing that was not timed is kept


def test_the_prediction_goes_through_both_measured_models() -> None:
    analysis = analysed(repeated())
    latency = Latency(analysis, FREE, Table(), ByWeights())
    small = halved(analysis)
    latency.fit(20.0, small, 0.4)
    assert latency(analysis.nothing_removed) == pytest.approx(20.0)
    assert latency(small) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("count", "full", "step", "around"),
    [
        (16, 64, 16, (16, 16)),
        (48, 64, 16, (48, 48)),
        (24, 64, 16, (24, 24)),  # off the staircase: itself
        (50, 50, 16, (50, 50)),  # all there are
        (1040, 2048, 16, (1024, 1152)),  # sixteen intervals
        (16, 2048, 16, (16, 128)),
        (5, 100, 1, (1, 7)),
    ],
)
def test_counts_at_which_pieces_are_timed(
    count: int, full: int, step: int, around: tuple[int, int]
) -> None:
    assert nodes_around(count, full, step, 16) == around


@given(st.floats(0, 1), st.floats(0, 1))
def test_interpolation_is_exact_on_planes(x: float, y: float) -> None:
    counts = (round(10 + 10 * x), round(30 + 20 * y))
    found = interpolated(counts, [(10, 20), (30, 50)], lambda c: 3 * c[0] + 2 * c[1] + 7)
    assert found == pytest.approx(3 * counts[0] + 2 * counts[1] + 7)


def test_between_entries_only_where_they_surround() -> None:
    table = Table({"f": {(8,): 10.0, (16,): 30.0}})
    assert table.between("f", (12,)) == 20.0
    assert table.between("f", (4,)) is None
    assert table.between("g", (12,)) is None


def test_a_table_is_kept_and_read_again(tmp_path: Path) -> None:
    table = Table({'Conv{a="b"}\n(t0)': {(8, 2): 10.25, (16, 2): 30.0}})
    keep(table, tmp_path / "folder" / "latency.toml")
    assert read(tmp_path / "folder" / "latency.toml").entries == table.entries
    (tmp_path / "damaged.toml").write_text("[[latency]]\nform = 3")
    assert read(tmp_path / "damaged.toml").entries == {}
    assert read(tmp_path / "absent.toml").entries == {}


def test_a_target_file_holds_a_table(tmp_path: Path) -> None:
    entries = {"Conv{}(t0)": {(8,): 10.0, (16,): 30.0}}
    target = Target("board", "a board", 4, {"default": 8}, latency=entries, rates={"Conv": 2.5})
    path = tmp_path / "board.toml"
    path.write_text(as_toml(target))
    assert choose({}, str(path)) == target


@pytest.mark.parametrize(
    "text",
    [
        "latency = 3",
        "[[latency]]\nform = 'f'",
        "[[latency]]\nform = 'f'\ncounts = [[1], [2]]\nmicroseconds = [1.0]",
        "[[latency]]\nform = 'f'\ncounts = [[1], [2, 3]]\nmicroseconds = [1.0, 2.0]",
        "[[latency]]\nform = 'f'\ncounts = [[1]]\nmicroseconds = [-1.0]",
        "latency_command = 3",
        "[rates]\nConv = 0",
    ],
)
def test_malformed_tables(tmp_path: Path, text: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(UsageError):
        choose({}, str(path))


def test_this_machines_key_names_what_times_depend_on() -> None:
    key = OnnxRuntime(3, "cpu").key
    assert "ONNX Runtime" in key
    assert "3 threads" in key


def test_stand_ins_are_not_counted() -> None:
    """A picture's piece keeps its layout: nothing is reordered that is not in the whole model."""
    analysis = analysed(repeated())
    alive = analysis.coupling.alive(analysis.nothing_removed)
    near = blocked(analysis)
    inner = split(analysis)[1]
    made = micro(analysis, inner, near, alive)
    found = kernels(made.model, made.feeds, rounds=2)
    own = [k for k in found if "graphprune_near" not in k.name]
    assert len(own) <= 2  # the convolution with its activation, and the stand-in's last reorder
