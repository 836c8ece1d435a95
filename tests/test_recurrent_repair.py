"""Repair of recurrent operators, and whole networks of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from recurrent_nets import QUICK, WAYS, damaged, error, feeds_of, finished, group_of, layer, network

from graphprune import api
from graphprune.analysis import Scope
from graphprune.errors import NothingPrunableError
from graphprune.gradient.reverse import gradient
from graphprune.repair import moments, udfc
from graphprune.repair.reconstruct import BIAS, reconstruct
from graphprune.shapes import infer
from graphprune.storage import load

# --- repair


def twins(op: str, way: str, **more: Any) -> onnx.ModelProto:
    """Hidden units 0 to 3 do what 8 to 11 do; readers tell them apart."""
    b = network(op, way, **more)
    arrays = {t.name: onnx.numpy_helper.to_array(t).copy() for t in b.initializers}
    for part in "wrb":
        name = f"{op}2_{part}"
        array = arrays[name]
        rows = array.reshape(len(array), -1, 12, *array.shape[2:])
        rows[:, :, :4] = rows[:, :, 8:]
    for tensor in b.initializers:
        tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return finished(b)


KINDS = [("LSTM", {}), ("GRU", {}), ("GRU", {"linear_before_reset": 1}), ("RNN", {})]


@pytest.mark.parametrize(("op", "more"), KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_what_others_say_too_is_restored(op: str, more: dict[str, int], way: str) -> None:
    prepared = api.prepare(twins(op, way, **more), Scope(lossless=False))
    damage = damaged(prepared, {group_of(prepared, (f"{op}2_r", 2)).index: range(4)})
    assert error(damage, damage.pruned) > 1e-3
    model, reports = reconstruct(damage)
    assert len(reports) == 2  # the recurrent weights, and what reads the states
    assert error(damage, model) < 1e-6
    onnx.checker.check_model(model.assemble(), full_check=True)


@pytest.mark.parametrize(("op", "more"), KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_networks_come_nearer(op: str, more: dict[str, int], way: str) -> None:
    """Two layers, half of the units and of the input features gone; on inputs never seen."""
    prepared = api.prepare(finished(network(op, way, layers=2, **more)))
    groups = prepared.analysis.coupling.groups
    damage = damaged(prepared, {g.index: range(0, len(g), 2) for g in groups}, feeds_of(12))
    fresh = feeds_of(4, start=50)
    model, reports = reconstruct(damage)
    assert len(reports) == 5
    assert error(damage, model) < 0.7 * error(damage, damage.pruned)
    assert error(damage, model, fresh) < 0.7 * error(damage, damage.pruned, fresh)


def test_input_weights_meet_the_gates_that_are_left() -> None:
    """Features and hidden units leave together: targets are cut to the surviving gates."""
    prepared = api.prepare(finished(network("LSTM", "bidirectional")))
    found = [group_of(prepared, (name, 2)).index for name in ("LSTM2_w", "LSTM2_r")]
    damage = damaged(prepared, {found[0]: [0, 3], found[1]: [1, 2, 7]})
    model, reports = reconstruct(damage)
    assert model.array("LSTM2_w").shape == (2, 4 * 9, 8)
    assert [r.before is not None and r.after is not None and r.after < r.before for r in reports]
    assert error(damage, model) < error(damage, damage.pruned)


def test_recurrent_weights_that_keep_their_states_stay() -> None:
    prepared = api.prepare(finished(network("GRU")))
    damage = damaged(prepared, {group_of(prepared, ("GRU2_w", 2)).index: [0, 3]})
    model, _ = reconstruct(damage)
    assert model.array("GRU2_r").tobytes() == damage.pruned.array("GRU2_r").tobytes()


def test_the_bias_form_leaves_recurrent_weights() -> None:
    prepared = api.prepare(finished(network("LSTM", layers=2)))
    groups = prepared.analysis.coupling.groups
    damage = damaged(prepared, {g.index: range(0, len(g), 2) for g in groups})
    model, reports = reconstruct(damage, BIAS)
    assert [r.how == "bias" for r in reports] == [False] * 4 + [True]
    assert all("not repaired" in r.how for r in reports[:4])
    assert model.array("LSTM2_b").tobytes() == damage.pruned.array("LSTM2_b").tobytes()
    assert error(damage, model) <= error(damage, damage.pruned)


def test_repairs_from_weights_say_why_not() -> None:
    prepared = api.prepare(finished(network("LSTM", "bidirectional", layers=2)))
    groups = prepared.analysis.coupling.groups
    damage = damaged(prepared, {g.index: range(0, len(g), 2) for g in groups})
    model, reports = moments.compensate(damage)
    assert ["LSTM" in r.how and "not repaired" in r.how for r in reports] == [False] + [True] * 4
    assert error(damage, model) < 2 * error(damage, damage.pruned)
    model, reports = udfc.compensate(damage)
    assert ["LSTM" in r.how and "not repaired" in r.how for r in reports] == [False] + [True] * 4
    assert np.isfinite(error(damage, model))


# --- end to end


@pytest.mark.parametrize(("op", "more"), KINDS)
@pytest.mark.parametrize("options", [{"samples": 32}, {"fast": True}, {"repair": "bias"}], ids=str)
def test_half_of_a_network(op: str, more: dict[str, int], options: dict[str, Any]) -> None:
    proto = finished(network(op, "bidirectional", layers=2, **more))
    result = api.prune(proto, **QUICK, **options)
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.verdict.passed
    onnx.checker.check_model(result.model, full_check=True)


def test_half_of_a_reader_of_lines() -> None:
    """Convolutions, columns as steps, two recurrent layers with a product between (CRNN)."""
    b = Builder(3)
    x = b.add("Relu", b.norm(b.conv("x", 1, 8), 8))
    x = b.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.add("Relu", b.conv(x, 8, 16))
    x = b.add("Relu", b.add("Conv", x, b.weight(16, 16, 4, 1), b.weight(16)))
    x = b.add("Transpose", b.add("Squeeze", x, b.ints(2)), perm=[2, 0, 1])
    x = layer(b, "LSTM", x, 16, 12, "bidirectional")
    x = b.add("MatMul", x, b.weight(24, 12))
    x = layer(b, "LSTM", x, 12, 12, "bidirectional")
    y = b.add("MatMul", x, b.weight(24, 7))
    proto = b.model({"x": ["n", 1, 8, 12]}, {y: [6, "n", 7]})
    result = api.prune(proto, **QUICK, samples=32)
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.verdict.passed
    sizes = [a.i for n in result.model.graph.node for a in n.attribute if a.name == "hidden_size"]
    assert max(sizes) < 12


def test_units_that_others_repeat_leave_first() -> None:
    """The evidence sees the recurrence: with twins gone nothing is lost."""
    result = api.prune(twins("LSTM", "forward"), **QUICK, samples=64, lossless=False)
    (entry,) = (g for g in result.plan.groups if ("LSTM2_r", 2) in {tuple(a) for a in g.axes})
    gone = set(entry.removed)
    assert len(gone) >= 4
    assert all(unit in gone or unit + 8 in gone for unit in range(4))


def test_first_states_on_the_interface_pin_the_units() -> None:
    b = Builder(1)
    w, r = b.weight(1, 24, 5), b.weight(1, 24, 8)
    y, last = b.add("GRU", b.add("Relu", "x"), w, r, "", "", "h", outputs=2, hidden_size=8)[:2]
    proto = b.model({"x": [1, 1, 5], "h": [1, 1, 8]}, {y: [1, 1, 1, 8], last: [1, 1, 8]})
    with pytest.raises(NothingPrunableError):
        api.prune(proto, **QUICK)


def test_a_state_of_one_sample_is_fed_with_one_sample() -> None:
    """The batch is open, the first state holds one row: more at a time would not run."""
    b = Builder(1)
    h = b.add("Relu", b.add("MatMul", "x", b.weight(5, 16)))
    h = b.add("Transpose", h, perm=[1, 0, 2])
    h = b.add("GRU", h, b.weight(1, 24, 16), b.weight(1, 24, 8), "", "", "h", hidden_size=8)
    y = b.add("MatMul", b.add("Transpose", h, perm=[2, 0, 1, 3]), b.weight(8, 3))
    proto = b.model({"x": ["n", 4, 5], "h": [1, 1, 8]}, {y: ["n", 4, 1, 3]})
    result = api.prune(proto, **QUICK | {"flops": 0.7}, samples=16)
    assert result.verdict.passed
    sizes = [a.i for n in result.model.graph.node for a in n.attribute if a.name == "hidden_size"]
    assert sizes == [8]  # a state on the interface pins its units
    assert any(pin.reason == "graph input 'h'" for pin in result.pinned)


def test_no_gradient_passes_a_recurrent_operator() -> None:
    model = load(finished(network()))
    shapes = infer(model, {"x": (7, 2, 5)})
    found = gradient(model, shapes, "x", model.outputs[0].name)
    assert found.name is None
    assert any("LSTM" in reason for reason in found.stopped)
