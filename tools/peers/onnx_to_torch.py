"""Read an ONNX file as a torch module, as a user of Torch-Pruning would have written it.

    from tools.peers.onnx_to_torch import OnnxModule
    module = OnnxModule(onnx.load("resnet18_ts.onnx"))

Nodes with constant weights become torch layers, the rest torch functions. Three things are said the
way torch code says them, because Torch-Pruning knows no other way: a MatMul and the Add of its bias
are one Linear, a Split into single slices that are then squeezed is `unbind`, and a Reshape that
makes or merges attention heads takes the width of a head from its input instead of a literal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from tools.peers.torch_operators import FUNCTIONS, LAYERS, Attributes


@dataclass(frozen=True)
class Step:
    """One node: `run` is the name of a layer of the module, or a function."""

    run: str | Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OnnxModule(nn.Module):
    """An ONNX graph of fixed shapes, run node by node.

    heads: name of each Linear in front of an attention Reshape → its number of heads.
    last: name of the layer that makes the output; its width is the interface of the model.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in [*graph.input, *graph.value_info]
        }
        self.weights = {t.name: _tensor(t) for t in graph.initializer}
        self.inputs = [v.name for v in graph.input if v.name not in self.weights]
        self.outputs = [v.name for v in graph.output]
        self.constants: dict[str, Tensor] = {}
        self.parameter_names: dict[str, str] = {}
        self.steps: list[Step] = []
        self.heads: dict[str, int] = {}
        self.last = ""
        self._build(list(graph.node))
        del self.weights, self.shapes

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Inputs and outputs in the order of the graph; shapes as in the ONNX file."""
        values = self.constants | dict(zip(self.inputs, inputs, strict=True))
        values |= {name: getattr(self, own) for name, own in self.parameter_names.items()}
        for step in self.steps:
            run = self.get_submodule(step.run) if isinstance(step.run, str) else step.run
            result = run(*(values[name] if name else None for name in step.inputs))
            several = isinstance(result, tuple)
            values.update(zip(step.outputs, result if several else (result,), strict=True))
        outputs = tuple(values[name] for name in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _build(self, nodes: list[onnx.NodeProto]) -> None:
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.done: set[str] = set()
        for node in nodes:
            if node.output[0] not in self.done:
                self._add(node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        del self.users, self.done

    def _add(self, node: onnx.NodeProto, attributes: Attributes) -> None:
        kind, names = node.op_type, list(node.input)
        if kind == "Constant":
            self.constants[node.output[0]] = _tensor(attributes["value"])
        elif kind == "Identity" and names[0] in self.weights:
            self.weights[node.output[0]] = self.weights[names[0]]
        elif kind in LAYERS and len(names) > 1 and all(n in self.weights for n in names[1:]):
            self._add_layer(node, attributes)
        elif kind == "Gather" and names[0] in self.weights:
            table = nn.Embedding.from_pretrained(self.weights[names[0]], freeze=False)
            self._add_step(node, self._own(table), names[1:])
        elif kind == "Split" and self._is_unbind(node, attributes.get("axis", 0)):
            outputs = [self.users[name][0].output[0] for name in node.output]
            self.done.update(outputs)
            axis = attributes.get("axis", 0)
            self._add_step(node, lambda x, _sizes: x.unbind(axis), names, outputs)
        elif kind == "Reshape" and names[1] in self.constants:
            self._add_reshape(node, self.constants[names[1]].tolist())
        else:
            self._add_function(node, attributes)

    def _add_layer(self, node: onnx.NodeProto, attributes: Attributes) -> None:
        weights, outputs = [self.weights[name] for name in node.input[1:]], list(node.output)
        if node.op_type == "MatMul" and (add := self._bias_add(node)) is not None:
            weights += [self.weights[name] for name in add.input if name in self.weights]
            outputs = list(add.output)
            self.done.add(outputs[0])
        self.last = self._own(LAYERS[node.op_type](attributes, *weights))
        self._add_step(node, self.last, node.input[:1], outputs)

    def _add_reshape(self, node: onnx.NodeProto, literal: list[int]) -> None:
        before, after = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if len(after) > len(before) and literal[: len(before) - 1] == list(before[:-1]):
            producer = next(s for s in self.steps if node.input[0] in s.outputs)
            if isinstance(producer.run, str):
                self.heads[producer.run] = after[-2]
        if len(after) != len(before):
            literal = [*after[:-1], -1]
        self._add_step(node, lambda x: x.reshape(literal), node.input[:1])

    def _add_function(self, node: onnx.NodeProto, attributes: Attributes) -> None:
        if node.op_type not in FUNCTIONS:
            what = f"{node.op_type} ({node.name})"
            raise NotImplementedError(f"not the peer: the benchmark's converter knows no {what}")
        for name in node.input:
            if name in self.weights and name not in self.parameter_names:
                own = f"parameter_{len(self.parameter_names)}"
                self.parameter_names[name] = own
                self.register_parameter(own, nn.Parameter(self.weights[name]))
        function = FUNCTIONS[node.op_type]

        def run(*inputs: Tensor) -> Any:
            return function(attributes, *inputs)

        if all(name in self.constants for name in node.input):
            self.constants[node.output[0]] = run(*(self.constants[name] for name in node.input))
        else:
            self._add_step(node, run, node.input)

    def _add_step(
        self,
        node: onnx.NodeProto,
        run: str | Callable[..., Any],
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
    ) -> None:
        self.steps.append(Step(run, tuple(inputs), tuple(outputs or node.output)))

    def _own(self, layer: nn.Module) -> str:
        name = f"{type(layer).__name__.lower()}_{len(self._modules)}"
        self.add_module(name, layer)
        return name

    def _bias_add(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The Add of a constant vector that alone uses the output of a MatMul."""
        users = self.users.get(node.output[0], [])
        if len(users) != 1 or users[0].op_type != "Add":
            return None
        vectors = [n for n in users[0].input if n in self.weights and self.weights[n].ndim == 1]
        return users[0] if vectors else None

    def _is_unbind(self, node: onnx.NodeProto, axis: int) -> bool:
        """Whether every output has width 1 and is squeezed at once."""
        users = [self.users.get(name, []) for name in node.output]
        return all(
            self.shapes[name][axis] == 1 and len(u) == 1 and u[0].op_type == "Squeeze"
            for name, u in zip(node.output, users, strict=True)
        )


def _tensor(value: onnx.TensorProto) -> Tensor:
    return torch.tensor(numpy_helper.to_array(value))
