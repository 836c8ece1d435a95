"""One line per operator: its gradient against central differences of the model itself."""
# ruff: noqa: E501

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from graphprune.errors import ModelError
from graphprune.gradient import gradient
from graphprune.gradient.rules import RULES
from graphprune.model import Array, Model
from graphprune.runtime import run_session, session
from graphprune.shapes import infer
from graphprune.storage import load

HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => (float weighted) {{ {body} '
HEAD += "weighted = Mul(y, mix) }}"
STEP = 2e-3

# operator: opset, inputs (all but x become constants), body that ends in y.
MODELS = {
    # pointwise
    **{
        op: (17, "float[3,5] x", f"y = {op}(x)")
        for op in "Relu HardSigmoid HardSwish Abs Neg Exp Sin Cos Erf Sigmoid Tanh Softplus "
        "Softsign Elu Celu Selu Identity Floor".split()
    },
    "LeakyRelu": (17, "float[3,5] x", "y = LeakyRelu<alpha=0.3>(x)"),
    "ThresholdedRelu": (17, "float[3,5] x", "y = ThresholdedRelu<alpha=0.5>(x)"),
    "Elu steep": (17, "float[3,5] x", "y = Elu<alpha=2.5>(x)"),
    "Celu wide": (17, "float[3,5] x", "y = Celu<alpha=2.5>(x)"),
    "Mish": (18, "float[3,5] x", "y = Mish(x)"),
    "Swish": (24, "float[3,5] x", "y = Swish<alpha=0.7>(x)"),
    "Gelu": (20, "float[3,5] x", "y = Gelu(x)"),
    "Gelu tanh": (20, "float[3,5] x", 'y = Gelu<approximate="tanh">(x)'),
    "Log": (17, "float[3,5] x", "e = Exp(x) p = Add(e, e) y = Log(p)"),
    "Sqrt": (17, "float[3,5] x", "e = Exp(x) y = Sqrt(e)"),
    "Reciprocal": (17, "float[3,5] x", "e = Exp(x) y = Reciprocal(e)"),
    "Clip": (17, "float[3,5] x", "lo = Constant<value = float {-0.5}>() "
             "hi = Constant<value = float {0.8}>() y = Clip(x, lo, hi)"),
    "Clip above": (17, "float[3,5] x", "hi = Constant<value = float {0.8}>() y = Clip(x, , hi)"),
    "Clip attributes": (9, "float[3,5] x", "y = Clip<min=0.0, max=0.8>(x)"),
    "PRelu": (17, "float[2,3,5] x, float[3,1] s", "y = PRelu(x, s)"),
    "Cast": (17, "float[3,5] x", "d = Cast<to=11>(x) s = Mul(d, d) y = Cast<to=1>(s)"),
    "Dropout": (17, "float[3,5] x", "y = Dropout(x)"),
    # two operands
    "Add": (17, "float[3,5] x, float[2,1,5] a", "y = Add(x, a)"),
    "Add itself": (17, "float[3,5] x", "y = Add(x, x)"),
    "Sub": (17, "float[3,1] x, float[2,3,5] a", "y = Sub(a, x)"),
    "Mul": (17, "float[1,5] x, float[2,3,5] a", "y = Mul(x, a)"),
    "Mul itself": (17, "float[3,5] x", "y = Mul(x, x)"),
    "Div": (17, "float[3,5] x, float[5] a", "y = Div(x, a)"),
    "Div by": (17, "float[5] x, float[3,5] a", "e = Exp(x) y = Div(a, e)"),
    "Pow": (17, "float[3,5] x", "p = Constant<value = float {3.0}>() y = Pow(x, p)"),
    "Pow integer": (17, "float[3,5] x", "p = Constant<value = int64 {2}>() y = Pow(x, p)"),
    "Max": (17, "float[3,5] x, float[5] a", "y = Max(x, a)"),
    "Min": (17, "float[3,5] x, float[5] a, float[3,1] b", "y = Min(x, a, b)"),
    "Sum": (17, "float[3,5] x, float[5] a", "y = Sum(x, a, x)"),
    "Mean": (17, "float[3,5] x, float[5] a", "y = Mean(x, a)"),
    "Where": (17, "float[3,5] x, float[5] a", "c = Greater(a, x) y = Where(c, x, a)"),
    "Where else": (17, "float[5] x, float[3,5] a", "c = Greater(a, x) y = Where(c, a, x)"),
    # linear
    "Conv": (17, "float[2,3,6,5] x, float[4,3,3,3] w, float[4] b", "y = Conv<pads=[1,1,1,1]>(x, w, b)"),
    "Conv bare": (17, "float[2,3,6,5] x, float[4,3,3,2] w", "y = Conv(x, w)"),
    "Conv far pads": (17, "float[1,2,4,4] x, float[3,2,2,1] w", "y = Conv<pads=[2,1,0,3]>(x, w)"),
    "Conv 1d": (17, "float[2,3,7] x, float[4,3,3] w", "y = Conv<dilations=[2], pads=[1,0]>(x, w)"),
    "Conv 3d": (17, "float[1,2,3,4,4] x, float[2,2,2,2,2] w", "y = Conv(x, w)"),
    "Conv strided": (17, "float[2,3,6,7] x, float[4,3,3,3] w", "y = Conv<strides=[2,3], pads=[1,0,1,1]>(x, w)"),
    "Conv strided 1x1": (17, "float[2,3,6,5] x, float[4,3,1,1] w", "y = Conv<strides=[2,2]>(x, w)"),
    "Conv grouped": (17, "float[2,4,5,5] x, float[6,2,3,3] w", "y = Conv<group=2, pads=[1,1,1,1]>(x, w)"),
    "Conv depthwise": (17, "float[2,4,5,5] x, float[4,1,3,3] w", "y = Conv<group=4, strides=[2,2], pads=[1,1,1,1]>(x, w)"),
    "Conv multiplier": (17, "float[1,3,5,5] x, float[6,1,3,3] w", "y = Conv<group=3, pads=[1,1,1,1]>(x, w)"),
    "Conv same upper": (17, "float[1,2,6,7] x, float[3,2,3,4] w", 'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)'),
    "Conv same lower": (17, "float[1,2,6,7] x, float[3,2,2,2] w", 'y = Conv<auto_pad="SAME_LOWER">(x, w)'),
    "Conv valid": (17, "float[1,2,6,7] x, float[3,2,2,2] w", 'y = Conv<auto_pad="VALID">(x, w)'),
    "ConvTranspose": (17, "float[2,3,3,4] x, float[3,2,3,3] w, float[2] b",
                      "y = ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,0]>(x, w, b)"),
    "ConvTranspose grouped": (17, "float[1,4,3,3] x, float[4,2,2,2] w", "y = ConvTranspose<group=2, strides=[2,2]>(x, w)"),
    "MatMul": (17, "float[2,3,4] x, float[4,5] w", "y = MatMul(x, w)"),
    "MatMul right": (17, "float[4,5] x, float[2,3,4] w", "y = MatMul(w, x)"),
    "MatMul itself": (17, "float[2,3,3] x", "y = MatMul(x, x)"),
    "MatMul vector": (17, "float[4] x, float[2,4,3] w", "y = MatMul(x, w)"),
    "Gemm": (17, "float[3,4] x, float[5,4] w, float[5] b", "y = Gemm<transB=1, alpha=0.5>(x, w, b)"),
    "Gemm turned": (17, "float[4,3] x, float[4,5] w", "y = Gemm<transA=1>(x, w)"),
    "Gemm right": (17, "float[4,5] x, float[3,4] w", "y = Gemm<beta=2.0>(w, x)"),
    "Gemm right turned": (17, "float[5,4] x, float[4,3] w", "y = Gemm<transA=1, transB=1>(w, x)"),
    "Gemm bias": (17, "float[1,5] x, float[3,4] a, float[4,5] b", "y = Gemm<beta=2.0>(a, b, x)"),
    # pools and reductions
    "GlobalAveragePool": (17, "float[2,3,4,5] x", "y = GlobalAveragePool(x)"),
    "GlobalMaxPool": (17, "float[2,3,4,5] x", "y = GlobalMaxPool(x)"),
    "AveragePool": (17, "float[1,2,6,6] x", "y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x)"),
    "AveragePool padded": (17, "float[1,2,6,5] x", "y = AveragePool<kernel_shape=[3,3], strides=[2,1], pads=[1,1,1,1]>(x)"),
    "AveragePool counted": (17, "float[1,2,6,5] x", "y = AveragePool<kernel_shape=[3,3], strides=[2,1], pads=[1,1,1,1], count_include_pad=1>(x)"),
    "AveragePool ceil": (17, "float[1,2,6,5] x", "y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)"),
    "AveragePool 1d": (17, "float[1,2,7] x", "y = AveragePool<kernel_shape=[3]>(x)"),
    "MaxPool": (17, "float[2,2,6,6] x", "y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)"),
    "MaxPool overlapping": (17, "float[2,2,7,6] x", "y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)"),
    "MaxPool dilated": (17, "float[1,2,7,6] x", "y = MaxPool<kernel_shape=[2,3], dilations=[2,1]>(x)"),
    "MaxPool ceil": (17, "float[1,2,6,6] x", "y = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)"),
    "MaxPool short": (17, "float[1,2,7,7] x", "y = MaxPool<kernel_shape=[2,2], strides=[3,3]>(x)"),
    "MaxPool 1d": (9, "float[1,2,7] x", "y = MaxPool<kernel_shape=[3]>(x)"),
    "ReduceMean": (17, "float[2,3,4] x", "y = ReduceMean<axes=[0,-1], keepdims=0>(x)"),
    "ReduceMean 18": (18, "float[2,3,4] x", "a = Constant<value_ints=[1]>() y = ReduceMean(x, a)"),
    "ReduceSum": (13, "float[2,3,4] x", "a = Constant<value_ints=[1]>() y = ReduceSum<keepdims=0>(x, a)"),
    "ReduceSum 11": (11, "float[2,3,4] x", "y = ReduceSum<axes=[1]>(x)"),
    "ReduceSum all": (17, "float[2,3,4] x", "y = ReduceSum(x)"),
    "ReduceSumSquare": (17, "float[2,3,4] x", "y = ReduceSumSquare<axes=[1]>(x)"),
    "ReduceL2": (17, "float[2,3,4] x", "y = ReduceL2<axes=[1]>(x)"),
    "ReduceMax": (17, "float[2,3,4] x", "y = ReduceMax<axes=[1], keepdims=0>(x)"),
    "ReduceMin": (17, "float[2,3,4] x", "y = ReduceMin(x)"),
    # normalisation
    "BatchNormalization": (15, "float[2,3,4] x, float[3] s, float[3] b, float[3] m, float[3] v",
                           "q = Abs(v) y = BatchNormalization(x, s, b, m, q)"),
    "LayerNormalization": (17, "float[2,3,6] x, float[6] s, float[6] b", "y = LayerNormalization(x, s, b)"),
    "LayerNormalization wide": (17, "float[2,3,4] x, float[3,4] s", "y = LayerNormalization<axis=1, epsilon=0.1>(x, s)"),
    "InstanceNormalization": (17, "float[2,3,6] x, float[3] s, float[3] b", "y = InstanceNormalization(x, s, b)"),
    "GroupNormalization 18": (18, "float[2,6,3] x, float[2] s, float[2] b", "y = GroupNormalization<num_groups=2>(x, s, b)"),
    "GroupNormalization 21": (21, "float[2,6,3] x, float[6] s, float[6] b", "y = GroupNormalization<num_groups=2>(x, s, b)"),
    "RMSNormalization": (23, "float[2,3,6] x, float[6] s", "y = RMSNormalization(x, s)"),
    "LRN": (17, "float[2,6,2,2] x", "y = LRN<size=3, alpha=0.8, beta=0.6, bias=1.5>(x)"),
    "Softmax": (17, "float[2,3,4] x", "y = Softmax<axis=1>(x)"),
    "Softmax 11": (11, "float[2,3,4] x", "y = Softmax<axis=1>(x)"),
    "LogSoftmax": (17, "float[2,3,4] x", "y = LogSoftmax(x)"),
    # movement
    "Reshape": (17, "float[2,6] x", "s = Constant<value_ints=[3,-1]>() y = Reshape(x, s)"),
    "Flatten": (17, "float[2,3,2] x", "y = Flatten(x)"),
    "Squeeze": (17, "float[2,1,3] x", "y = Squeeze(x)"),
    "Unsqueeze": (11, "float[2,3] x", "y = Unsqueeze<axes=[1]>(x)"),
    "Transpose": (17, "float[2,3,4] x", "y = Transpose<perm=[1,2,0]>(x)"),
    "Transpose all": (17, "float[2,3,4] x", "y = Transpose(x)"),
    "Expand": (17, "float[3,1] x", "s = Constant<value_ints=[2,3,4]>() y = Expand(x, s)"),
    "Tile": (17, "float[2,3] x", "s = Constant<value_ints=[3,2]>() y = Tile(x, s)"),
    "Concat": (17, "float[2,3] x, float[2,2] a", "y = Concat<axis=-1>(x, a, x)"),
    "Concat 9": (9, "float[2,3] x, float[2,2] a", "y = Concat<axis=1>(x, a, x)"),
    "Split": (17, "float[2,6] x", "a, b, c = Split<axis=1>(x) e = Mul(a, c) y = Add(e, a)"),
    "Split sizes": (13, "float[2,6] x", "s = Constant<value_ints=[2,4]>() a, y = Split<axis=-1>(x, s)"),
    "Slice": (17, "float[4,6] x", "s = Constant<value_ints=[1,-5]>() e = Constant<value_ints=[3,100]>() y = Slice(x, s, e)"),
    "Slice strided": (17, "float[4,6,3] x", "s = Constant<value_ints=[1]>() e = Constant<value_ints=[6]>() "
                      "a = Constant<value_ints=[1]>() t = Constant<value_ints=[2]>() y = Slice(x, s, e, a, t)"),
    "Slice backwards": (17, "float[4,6] x", "s = Constant<value_ints=[-1]>() e = Constant<value_ints=[-9999]>() "
                        "a = Constant<value_ints=[-1]>() t = Constant<value_ints=[-2]>() y = Slice(x, s, e, a, t)"),
    "Slice 9": (9, "float[4,6] x", "y = Slice<starts=[1], ends=[5], axes=[1]>(x)"),
    "Gather": (17, "float[3,4,2] x", "i = Constant<value = int64[2,2] {0,-1,2,0}>() y = Gather<axis=1>(x, i)"),
    "Gather one": (17, "float[3,4] x", "i = Constant<value = int64 {2}>() y = Gather<axis=0>(x, i)"),
    "Pad": (17, "float[2,3] x", "p = Constant<value_ints=[1,0,-1,2]>() y = Pad(x, p)"),
    "Pad 9": (9, "float[2,3] x", "y = Pad<pads=[1,0,0,2]>(x)"),
    "Pad reflect": (17, "float[2,4] x", 'p = Constant<value_ints=[0,2,0,1]>() y = Pad<mode="reflect">(x, p)'),
    "Pad edge": (17, "float[2,4] x", 'p = Constant<value_ints=[1,2,0,1]>() y = Pad<mode="edge">(x, p)'),
    "Pad axes": (18, "float[2,3] x", "p = Constant<value_ints=[1,2]>() v = Constant<value = float {1.0}>() "
                 "a = Constant<value_ints=[-1]>() y = Pad(x, p, v, a)"),
    "DepthToSpace": (17, "float[2,8,2,3] x", "y = DepthToSpace<blocksize=2>(x)"),
    "DepthToSpace CRD": (17, "float[2,8,2,3] x", 'y = DepthToSpace<blocksize=2, mode="CRD">(x)'),
    "SpaceToDepth": (17, "float[2,2,4,6] x", "y = SpaceToDepth<blocksize=2>(x)"),
    "Resize": (17, "float[1,2,3,4] x", "s = Constant<value_floats=[1.0,1.0,2.0,2.0]>() "
               'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , s)'),
    "Resize linear": (17, "float[1,2,3,4] x", "z = Constant<value_ints=[1,2,5,6]>() "
                      'y = Resize<mode="linear">(x, , , z)'),
    "Resize cubic": (18, "float[1,2,4,4] x", "z = Constant<value_ints=[6,7]>() "
                     'y = Resize<mode="cubic", axes=[2,3]>(x, , , z)'),
    "Resize 11": (11, "float[1,2,3,4] x, float[0] r", "s = Constant<value = float[4] {1,1,2,3}>() "
                  'y = Resize<mode="linear">(x, r, s)'),
    "Resize 10": (10, "float[1,2,3,4] x", "s = Constant<value = float[4] {1,1,2,2}>() y = Resize(x, s)"),
    "Upsample": (9, "float[1,2,3,4] x", "s = Constant<value = float[4] {1,1,2,2}>() y = Upsample(x, s)"),
    # what a node gets from several sides
    "accumulated": (17, "float[2,3,4,4] x", "m = ReduceMean<axes=[0,2,3]>(x) e = Exp(x) c = Sub(e, m) y = Mul(c, m)"),
    "shape arithmetic": (17, "float[2,3,4] x", "d = Shape(x) o = Constant<value_ints=[1]>() i = Gather(d, o) "
                         "f = Constant<value_ints=[-1]>() t = Concat<axis=0>(i, f) e = Exp(x) y = Reshape(e, t)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_rule(name: str) -> None:
    opset, inputs, body = MODELS[name]
    model, x = _built(opset, inputs, body)
    result = gradient(model, infer(model), "x", "weighted")
    assert result.stopped == ()
    expected = _differences(model, x)
    if result.name is None:  # a rule may know that nothing flows
        assert not expected.any()
        return
    found = run_session(session(result.model, 1), {"x": x})[-1]
    assert found.shape == x.shape
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)


def test_every_rule_has_a_line() -> None:
    used = {node.op_type for name in MODELS for node in _built(*MODELS[name])[0].nodes}
    assert set(RULES) - used <= {"CastLike", "Ceil", "Round", "Sign"}


def _built(opset: int, inputs: str, body: str) -> tuple[Model, Array]:
    """The model with every input but x as a constant, and its output weighted at random."""
    rng = np.random.default_rng(5)
    text = HEAD.format(opset=opset, inputs=inputs, body=body)
    bare = onnx.parser.parse_model(text)
    bare.graph.node.pop()
    y = infer(load(_with_output(bare, "y"))).shape["y"]
    proto = onnx.parser.parse_model(text)
    x = np.zeros(0)
    for value in list(proto.graph.input):
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32)
        if value.name == "x":  # evenly apart: no two values change places within a step
            spaced = np.linspace(-1.6, 1.5, array.size, dtype=np.float32)
            x = rng.permutation(spaced).reshape(shape)
            continue
        proto.graph.input.remove(value)
        proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
    mix = rng.standard_normal(y).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(mix, "mix"))
    return load(proto), x


def _with_output(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    proto.graph.output[0].name = name
    return proto


def _differences(model: Model, x: Array) -> Array:
    """Central differences of the sum of the output, element by element."""
    runner = session(model, 1)
    slopes = np.zeros(x.size)
    for i in range(x.size):
        sides = []
        for sign in (1, -1):
            moved = x.copy()
            moved.reshape(-1)[i] += sign * STEP
            sides.append(run_session(runner, {"x": moved})[0].astype(np.float64).sum())
        slopes[i] = (sides[0] - sides[1]) / (2 * STEP)
    return slopes.reshape(x.shape)


def test_an_operator_without_a_rule_stops_the_gradient_and_is_named() -> None:
    model, x = _built(
        17,
        "float[3,4] x",
        "e = Exp(x) s = CumSum(x, axis) y = Add(e, s)".replace(
            "s = CumSum", "axis = Constant<value = int64 {0}>() s = CumSum"
        ),
    )
    result = gradient(model, infer(model), "x", "weighted")
    assert result.stopped == ("CumSum (s: no rule)",)
    found = run_session(session(result.model, 1), {"x": x})[-1]
    mix = model.array("mix")
    np.testing.assert_allclose(found, mix * np.exp(x), rtol=1e-5)


def test_nothing_flows_through_a_stop_alone() -> None:
    model, _ = _built(
        17, "float[3,4] x", "axis = Constant<value = int64 {0}>() y = CumSum(x, axis)"
    )
    result = gradient(model, infer(model), "x", "weighted")
    assert result.name is None
    assert len(result.stopped) == 1


def test_a_dynamic_form_of_a_known_operator_stops() -> None:
    model, _ = _built(17, "float[3,4] x", "y = Pow(x, x)")
    result = gradient(model, infer(model), "x", "weighted")
    assert result.stopped == ("Pow (y: the exponent depends on the input)",)


def test_an_old_opset_is_refused_with_a_hint() -> None:
    model, _ = _built(8, "float[3,4] x", "y = Relu(x)")
    with pytest.raises(ModelError, match="opset 9"):
        gradient(model, infer(model), "x", "weighted")


def test_the_gradient_is_deterministic() -> None:
    model, x = _built(*MODELS["Conv strided"])
    shapes = infer(model)
    made = [gradient(model, shapes, "x", "weighted").model for _ in range(2)]
    assert made[0].sha256 == made[1].sha256
    assert x.shape == shapes.inputs["x"]
