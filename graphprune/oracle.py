"""Law 3: a cut model must equal the original whose consumers read zeros where slots left.

What chooses among experts reads a very low number where one left; statistics over slots of which
some left are taken over the survivors there too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from graphprune import external
from graphprune.branches import forced
from graphprune.choices import lowered
from graphprune.control import is_open, parts
from graphprune.coupling import Coupling, Mask
from graphprune.errors import ModelError
from graphprune.masking import Masks
from graphprune.model import Array, Model, set_initializer
from graphprune.noise import stilled
from graphprune.relations import Contraction
from graphprune.runtime import Feeds, opened
from graphprune.shapes import Shapes
from graphprune.survivors import Survivors, shifted_nodes

Open = Callable[[Model], Callable[[Feeds], list[Array]]]
SHARES = {"Sigmoid", "HardSigmoid", "Softmax"}  # numbers of at most one
SHARE = 1e-2  # least magnitude to compare them with: ONNX Runtime's are good to 1e-7 of one
NOISE, MOST_NOISE = 0.01, 100.0  # of what an activation reads, as seen in its output; at most
USUAL, FAR = 0.02, 1e4  # the quantile of magnitudes that is usual, and how far beyond masks are
FILLS = 9  # opset from which ConstantOfShape is there,
FILLED = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}  # and what it makes
# Operators that hand numbers of their first input on, or a mean or the largest of them.
CARRIERS = {"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice"}
CARRIERS |= {"Gather", "Split", "ReduceMean", "ReduceMax", "ReduceMin"}


def zeroed(
    model: Model, shapes: Shapes, coupling: Coupling, alive: Mask, statistics: bool = True
) -> Model:
    """The original with a zero mask on every contraction that loses slots; its shapes stay.

    Only contractions are masked: whatever reaches them at a slot that left no longer matters.
    Nodes that take ``statistics`` over slots of which some left get the survivors.
    """
    masks = Masks(model, shapes, coupling.relations)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.nodes]
    inserted: dict[int, list[onnx.NodeProto]] = {}
    for stated in coupling.relations.contractions:
        kept = alive[stated.slots]
        if kept.all():
            continue
        contraction = _lighter(model, shapes, stated)
        node = nodes[contraction.node]
        name = node.input[contraction.input]
        masked, new = masks.apply(name, contraction, kept)
        node.input[contraction.input] = masked
        inserted.setdefault(contraction.node, []).extend(new)
    branches = (*coupling.relations.branches, *coupling.relations.apart)
    for name in dict.fromkeys(b.tensor for b in branches if not alive[b.slots].all()):
        zeros = _zeros(model, shapes, name)
        reader = model.consumers[name][0][0]
        terms = nodes[reader].input
        terms[:] = [zeros[-1].output[0] if n == name else n for n in terms]
        inserted.setdefault(reader, []).extend(zeros)
    limits: list[onnx.TensorProto] = []
    for choice in coupling.relations.choices:
        kept = alive[choice.slots]
        name = model.nodes[choice.node].input[choice.input]
        if kept.all():
            continue
        rank = len(shapes.shape[name] or ())
        nodes[choice.node].input[choice.input], new, made = lowered(
            nodes[choice.node].input[choice.input], choice, kept, rank, shapes.dtype[name]
        )
        inserted.setdefault(choice.node, []).extend(new)
        limits += made
    survivors = Survivors(coupling.relations, alive)
    appended: dict[int, list[onnx.NodeProto]] = {}
    for i in shifted_nodes(coupling.relations, alive) if statistics else ():
        before, appended[i] = survivors.apply(i, model.nodes[i], nodes[i])
        inserted.setdefault(i, []).extend(before)
    order = [
        n
        for i, node in enumerate(nodes)
        for n in (*inserted.get(i, ()), node, *appended.get(i, ()))
    ]
    constants = (*masks.tensors.values(), *limits, *survivors.tensors.values())
    return model.with_graph(order, [*model.initializers.values(), *constants])


def _zeros(model: Model, shapes: Shapes, name: str) -> list[onnx.NodeProto]:
    """Nodes that make zeros of a tensor's shape and type."""
    result = f"{name}/graphprune_zero"
    kind = shapes.dtype[name]
    if model.opsets.get("", 1) < FILLS or kind not in FILLED:
        return [helper.make_node("Sub", [name, name], [result], name=result)]
    value = helper.make_tensor("value", kind, [1], [0])
    return [
        helper.make_node("Shape", [name], [f"{result}_shape"], name=f"{result}_shape"),
        helper.make_node("ConstantOfShape", [f"{result}_shape"], [result], result, value=value),
    ]


def _lighter(model: Model, shapes: Shapes, contraction: Contraction) -> Contraction:
    """The same zeros in what a weight on disk is multiplied with: no masked copy of the weight."""
    inputs = list(model.nodes[contraction.node].input)
    weight, partner = model.initializers.get(inputs[contraction.input]), contraction.partner
    if weight is None or not external.on_disk(weight) or partner is None:
        return contraction
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(shapes.dtype[partner.tensor]))
    if contraction.quantised is not None or dtype.kind in "iub" or partner.tensor not in inputs:
        return contraction
    return replace(contraction, input=inputs.index(partner.tensor), axis=partner.index)


def sliced(tensors: Mapping[str, Array], coupling: Coupling, alive: Mask) -> dict[str, Array]:
    """Arrays by tensor name without the slots that left."""
    return {
        name: _each_axis(name, array, coupling, alive, False) for name, array in tensors.items()
    }


def blanked(tensors: Mapping[str, Array], coupling: Coupling, alive: Mask) -> dict[str, Array]:
    """Arrays by tensor name with zeros at the slots that left; integers may divide, so stay."""
    return {name: _each_axis(name, array, coupling, alive, True) for name, array in tensors.items()}


def _each_axis(name: str, array: Array, coupling: Coupling, alive: Mask, blank: bool) -> Array:
    tensor = coupling.relations.slots.tensors.get(name)
    for axis in tensor or ():
        kept = alive[axis.slots]
        if kept.all():
            continue
        if blank and array.dtype.kind in "iu":
            continue
        if blank:
            array = array.copy()
            array[(slice(None),) * axis.index + (~kept,)] = 0
        else:
            array = np.compress(kept, array, axis=axis.index)
    return array


def relative_error(
    expected: list[Array], actual: list[Array], floors: Sequence[float] = ()
) -> float:
    """Largest difference over the largest magnitude, of all outputs; infinite if shapes differ.

    ``floors`` are the least magnitudes to compare with, for outputs that may vanish altogether.
    """
    worst = 0.0
    floors = floors or [1e-30] * len(expected)
    for wanted, got, floor in zip(expected, actual, floors, strict=True):
        a, b = wanted, got
        if not isinstance(a, np.ndarray) or a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.dtype.kind == "V":  # bfloat16 and the 8-bit floats, which numpy itself lacks
            a, b = a.astype(np.float32), b.astype(np.float32)
        if a.size == 0 or np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"):
            continue
        if a.dtype.kind not in "fc":
            worst = max(worst, float((a != b).mean()))
            continue
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)):
            return float("inf")
        difference = np.abs(a[finite].astype(np.float64) - b[finite].astype(np.float64))
        scale = float(np.abs(a[finite].astype(np.float64)).max(initial=0.0))
        worst = max(worst, float(difference.max(initial=0.0)) / max(scale, floor))
    return worst


def law_error(
    model: Model,
    cut: Model,
    shapes: Shapes,
    coupling: Coupling,
    alive: Mask,
    feeds: Feeds,
    open_model: Open = opened,
) -> float:
    """Relative error between the cut model and the zeroed original on the same inputs.

    Where the interface is pinned the inputs and outputs are whole; in a rule's own test they may
    lose slots too, and are blanked and sliced alike.
    """
    return law_errors(model, cut, shapes, coupling, alive, [feeds], open_model)[0]


def law_errors(
    model: Model,
    cut: Model,
    shapes: Shapes,
    coupling: Coupling,
    alive: Mask,
    several: Sequence[Feeds],
    open_model: Open = opened,
    must_be_finite: bool = False,
    taken: frozenset[str] = frozenset(),
    statistics: bool = True,
) -> list[float]:
    """``law_error`` for several sets of inputs, with one session each for the two models,
    one after the other.

    Sets after the first may be of sizes that the original cannot run, with ``taken`` any of them;
    those give no number. With
    ``must_be_finite`` outputs that are all NaN or infinite, which prove nothing, are an error.
    ``taken`` are tokens of bodies that both models are forced to run, at those sizes that they can.
    ``statistics`` over slots of which some left are taken over the survivors in both models.
    """
    fills = random_fills(model, shapes)
    told = compared(model, shapes)
    zero = zeroed(model, shapes, coupling, alive, statistics)
    masked = forced(stilled(filled(zero, fills), shapes.dtype), taken)
    smaller = forced(stilled(filled(cut, sliced(fills, coupling, alive)), shapes.dtype), taken)
    wanted: list[dict[str, Array] | None] = []
    original = open_model(with_outputs(masked, [*told.taps.values()], shapes))
    for i, feeds in enumerate(several):
        try:
            expected = original(blanked(feeds, coupling, alive))
        except ModelError:
            if i == 0 and not taken:
                raise
            wanted.append(None)
            continue
        if must_be_finite and not any(_says_something(array) for array in expected):
            raise ModelError(
                "nothing can be verified: every output on random inputs is NaN or infinite",
                hint="Check the weights for infinities and overflows.",
            )
        wanted.append(sliced(dict(zip(told.names, expected, strict=True)), coupling, alive))
    del original  # of two large models one at a time is in memory
    result = open_model(with_outputs(smaller, [*told.taps.values()], shapes))
    errors = []
    for feeds, outputs in zip(several, wanted, strict=True):
        if outputs is None:
            continue
        try:
            actual = result(sliced(feeds, coupling, alive))
        except ModelError:
            if not taken:
                raise
            return [float("inf")]  # the original ran here
        errors.append(told.error([outputs[name] for name in told.names], actual))
    return errors


@dataclass(frozen=True)
class Compared:
    """What is compared of two models: the outputs, and what their activations read."""

    names: list[str]
    taps: dict[str, str]  # output → what its activation reads
    shares: frozenset[str]  # outputs whose numbers are of a Sigmoid or a Softmax

    def error(self, expected: list[Array], actual: list[Array]) -> float:
        """The largest relative error of all."""
        found = dict(zip(self.names, expected, strict=True))
        floors = [self._floor(name, found) for name in self.names]
        pairs = zip(self.names, expected, actual, strict=True)
        apart = max(
            (_masked_error(a, b) for n, a, b in pairs if n in self.taps.values()), default=0.0
        )
        return max(apart, relative_error(expected, actual, floors))

    def _floor(self, name: str, found: Mapping[str, Array]) -> float:
        """The least magnitude to compare an output with. A Sigmoid or Softmax moves by no more than
        what it reads, which is held to the law itself: noise of large numbers is its noise too."""
        if name not in self.taps:
            return SHARE if name in self.shares else 1e-30
        read = found[self.taps[name]]
        sizes = np.abs(read[np.isfinite(read) & ~_masks(read)])
        return float(np.clip(NOISE * sizes.max(initial=0.0), 1.0, MOST_NOISE))


def compared(model: Model, shapes: Shapes, other: Model | None = None) -> Compared:
    """Of ``model`` and another one, ``other``, where tensors may have gone there."""
    taps = {
        output: source
        for output, source in before_last_activation(model, shapes).items()
        if other is None or source in other.producer
    }
    names = [*(value.name for value in model.outputs), *taps.values()]
    return Compared(names, taps, shares(model))


def _masks(array: Array) -> NDArray[np.bool_]:
    """Numbers far beyond the small ones: what is added to logits that are not to count. On their
    scale all others would look alike."""
    sizes = np.abs(array)
    some = sizes[np.isfinite(array) & (sizes > 0)]
    usual = float(np.quantile(some, USUAL)) if some.size else 0.0
    return np.asarray(sizes > FAR * usual)


def _masked_error(expected: Array, actual: Array) -> float:
    """The error of what masks leave, on its own scale, at least of one: what is smaller moves no
    Softmax. That of the masks is seen anyhow."""
    if expected.dtype.kind != "f" or expected.shape != actual.shape:
        return 0.0  # which is another check's
    far = _masks(expected)
    return relative_error([expected[~far]], [actual[~far]], [1.0]) if far.any() else 0.0


def _says_something(array: Array) -> bool:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not array.size:
        return True
    return bool(np.isfinite(array).any())


def before_last_activation(model: Model, shapes: Shapes) -> dict[str, str]:
    """Output → what its activation reads. A saturated Sigmoid or Softmax hides any difference, and
    shows nothing but rounding once it vanishes, and the position of the largest of many numbers
    hides all of them: what these read is held to the law relatively, and the output itself on the
    scale of that, at least of one.
    """
    taps: dict[str, str] = {}
    for value in model.outputs:
        name = _carried(model, value.name)
        node = model.nodes[model.producer[name]] if name in model.producer else None
        if node is None or len(node.input) != 1 or node.input[0] in model.constant_names:
            continue
        source = node.input[0]
        floats = shapes.dtype.get(source) == onnx.TensorProto.FLOAT
        largest = node.op_type in ("ArgMax", "ArgMin") and not node.domain
        same = largest or shapes.shape.get(source) == shapes.shape.get(name)
        fresh = source not in model.output_names and source not in taps.values()
        if floats and same and fresh and source in model.producer:
            taps[value.name] = source
    return taps


def _carried(model: Model, name: str) -> str:
    """What ``name`` only hands on."""
    seen = {name}
    while name in model.producer:
        node = model.nodes[model.producer[name]]
        if node.op_type not in CARRIERS or node.domain or node.input[0] in seen:
            return name
        name = node.input[0]
        seen.add(name)
    return name


def shares(model: Model) -> frozenset[str]:
    """Outputs whose numbers are all of a Sigmoid or a Softmax, whatever branch they come from."""
    return frozenset(v.name for v in model.outputs if _is_share(model, v.name))


def _is_share(model: Model, name: str) -> bool:
    waiting, seen = [name], {name}
    while waiting:
        name = _carried(model, waiting.pop())
        if name not in model.producer:
            return False
        node = model.nodes[model.producer[name]]
        if is_open(node) and node.op_type == "If":
            place = list(node.output).index(name)
            found = {given[place] for _, given in parts(node).bodies}
        elif node.op_type == "Concat" and not node.domain:
            found = set(node.input)
        elif node.op_type in SHARES and not node.domain:
            continue
        else:
            return False
        waiting += sorted(found - seen)
        seen |= found
    return True


def with_outputs(model: Model, names: Sequence[str], shapes: Shapes) -> Model:
    """The model with further outputs; no shape is declared, so none can be wrong."""
    if not names:
        return model
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    for name in names:
        kind = helper.make_tensor_type_proto(shapes.dtype[name], None)
        skeleton.graph.output.append(helper.make_value_info(name, kind))
    return replace(model, skeleton=skeleton)


def random_fills(model: Model, shapes: Shapes) -> dict[str, Array]:
    """Seeded weights for those that the model only fills with one number (ConstantOfShape).

    Equal weights cannot tell which channels left; for the proof both models get random ones.
    Matrices keep the variance of what flows through them; vectors are positive, as variances are.
    """
    fills: dict[str, Array] = {}
    for node in model.nodes:
        name = node.output[0] if node.output else ""
        shape = shapes.shape.get(name)
        floats = shapes.dtype.get(name) == onnx.TensorProto.FLOAT
        if node.op_type != "ConstantOfShape" or name not in model.constant_names or not floats:
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if shape and len(shape) > 1:
            scale = np.float32(np.prod(shape[1:]) ** -0.5)
            fills[name] = rng.standard_normal(shape, dtype=np.float32) * scale
        elif shape:
            fills[name] = rng.random(shape, dtype=np.float32) + np.float32(0.5)
    return fills


def filled(model: Model, fills: Mapping[str, Array]) -> Model:
    """The model with initialisers in the place of the nodes that write ``fills``."""
    if not fills:
        return model
    nodes = [node for node in model.nodes if not fills.keys() & set(node.output)]
    weights = [set_initializer(name, array) for name, array in fills.items()]
    return model.with_graph(nodes, [*model.initializers.values(), *weights])
