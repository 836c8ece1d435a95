"""Control flow laid open: the bodies of If, Loop and Scan as part of one flat list of nodes.

    …, Enter(cond) → token₁, *nodes of then*, Enter(cond) → token₂, *nodes of else*,
    If(cond, token₁, then's outputs…, token₂, else's outputs…) → outputs, …

A body's nodes stand right before the node that they belong to, after an ``Enter`` that writes the
body's own inputs (and a token, so that it counts as needed). Names are unique over the whole list,
and a body's initialisers are the model's. So there is one allocation over everything, and whoever
walks the nodes in order (rules, coupling, cost, cut, oracle) need not know of bodies. Whatever is
put beside a node of a body is in that body. ``close_bodies`` puts all back; a body's initialisers
stay with the model, where bodies may read them.

Recursion goes as deep as bodies do: protobuf reads no more than 31 of them inside one another.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, helper

DOMAIN = "graphprune.control"
ENTER = "Enter"
OPENABLE = ("If", "Loop", "Scan")
SCAN_WITHOUT_BATCH = 9  # opset from which Scan has no batch axis of its own

Alias = ChainMap[str, str]


@dataclass
class Opened:
    """The flat list, and what came out of the bodies with it."""

    taken: set[str]  # names in use
    uses: dict[str, int] = field(default_factory=dict)  # name with its body → how often given
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    infos: list[onnx.ValueInfoProto] = field(default_factory=list)

    def fresh(self, name: str, scope: str) -> str:
        """``name`` if nothing else has it, else with its body before it."""
        new, key = name, f"{scope}/{name}"
        while new in self.taken:
            self.uses[key] = number = self.uses.get(key, 0) + 1
            new = key if number == 1 else f"{key}_{number}"
        self.taken.add(new)
        return new


def is_open(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The subgraphs of a control-flow node; none where they stand before it."""
    if is_open(node):
        return []
    graphs = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return graphs + [g for a in node.attribute for g in a.graphs]


def open_bodies(
    nodes: Iterable[onnx.NodeProto], taken: Collection[str], opset: int
) -> Opened | None:
    """Lay open every body that can be; ``None`` where there is none. ``taken``: names in use."""
    nodes = list(nodes)
    if not any(_openable(node, opset) for node in nodes):
        return None
    opened = Opened(set(taken))
    for node in nodes:
        if _openable(node, opset):
            _open(opened, node, ChainMap())
        else:
            opened.nodes.append(node)
    return opened


def _openable(node: onnx.NodeProto, opset: int) -> bool:
    """If, Loop and Scan that are sound, with dense initialisers, in which nothing else has bodies.

    Anything else stays as it is: what its bodies read is pinned.
    """
    if node.op_type not in OPENABLE or node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Scan" and opset < SCAN_WITHOUT_BATCH:
        return False
    inside = bodies(node)
    return (
        _is_sound(node)
        and not any(body.sparse_initializer for body in inside)
        and all(_openable(inner, opset) for body in inside for inner in body.node if bodies(inner))
    )


def _is_sound(node: onnx.NodeProto) -> bool:
    """Whether the node and its bodies take and give as many values as belong together."""
    graphs = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    if len(graphs) != len(bodies(node)):
        return False
    taken, given = len(node.input), len(node.output)
    if node.op_type == "If":
        named = graphs.keys() == {"then_branch", "else_branch"}
        return named and taken == 1 and all(len(g.output) == given for g in graphs.values())
    if graphs.keys() != {"body"}:
        return False
    formal, results = len(graphs["body"].input), len(graphs["body"].output)
    if node.op_type == "Loop":
        return taken <= formal and 2 <= formal <= results + 1 and results == given + 1
    scans = int(attribute(node, "num_scan_inputs", 0))
    axes = len(attribute(node, "scan_input_axes", [0] * scans))
    states = taken - scans
    places = len(attribute(node, "scan_output_axes", [0] * (results - states)))
    fits = taken == formal and results == given and 0 <= states <= results
    return fits and scans > 0 and axes == scans and places == results - states


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def said(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute with bytes as text."""
    value = attribute(node, name, default)
    return value.decode() if isinstance(value, bytes) else value


def integers(given: Any, value: NDArray[Any] | None) -> list[int] | None:
    """A list that older opsets give as attribute (``given``) and newer ones as input (``value``);
    ``None`` where neither is known."""
    if given is not None:
        return [int(v) for v in given] if isinstance(given, Sequence) else [int(given)]
    return None if value is None else [int(v) for v in value.reshape(-1)]


def _open(opened: Opened, node: onnx.NodeProto, alias: Alias) -> None:
    label = node.name or next((name for name in node.output if name), node.op_type)
    inputs = [alias.get(name, name) for name in node.input]
    flat = onnx.NodeProto()
    flat.op_type, flat.domain, flat.name = node.op_type, DOMAIN, node.name
    flat.doc_string = node.doc_string
    flat.metadata_props.extend(node.metadata_props)
    flat.attribute.extend(a for a in node.attribute if a.type != AttributeProto.GRAPH)
    graphs = [a for a in node.attribute if a.type == AttributeProto.GRAPH]
    graphs.sort(key=lambda a: a.name != "then_branch")
    inputs += [""] * (len(graphs[0].g.input) - len(inputs))  # optional ones may be left out
    flat.input.extend(inputs)
    for attribute in graphs:
        scope = f"{label}/{attribute.name}"
        inner: Alias = alias.new_child()
        token = opened.fresh(scope, scope)
        enter = helper.make_node(ENTER, inputs, [token], scope, domain=DOMAIN, of=node.op_type)
        enter.attribute.extend(a for a in node.attribute if a.type != AttributeProto.GRAPH)
        for value in attribute.g.input:
            inner[value.name] = opened.fresh(value.name, scope)
            enter.output.append(inner[value.name])
        opened.nodes.append(enter)
        _open_body(opened, attribute.g, inner, scope)
        flat.input.append(token)
        flat.input.extend(inner.get(value.name, value.name) for value in attribute.g.output)
        signature = flat.attribute.add()
        signature.name, signature.type = attribute.name, AttributeProto.GRAPH
        _signature(opened, attribute.g, inner, signature.g)
    flat.output.extend(node.output)
    opened.nodes.append(flat)


def _open_body(opened: Opened, body: onnx.GraphProto, alias: Alias, scope: str) -> None:
    for tensor in body.initializer:
        if tensor.name in alias.maps[0]:
            continue  # the default of a body's input: its caller always gives one
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = alias[tensor.name] = opened.fresh(tensor.name, scope)
        opened.initializers.append(copy)
    for node in body.node:
        names = {name: opened.fresh(name, scope) for name in node.output if name}
        if bodies(node):
            _open(opened, node, alias.new_child())
            written = opened.nodes[-1]
        else:
            written = onnx.NodeProto()
            written.CopyFrom(node)
            for i, name in enumerate(node.input):
                written.input[i] = alias.get(name, name)
            opened.nodes.append(written)
        for i, name in enumerate(node.output):
            written.output[i] = names.get(name, "")
        alias.update(names)
    for info in body.value_info:
        if info.name in alias.maps[0]:
            opened.infos.append(_renamed(info, alias[info.name]))


def _renamed(info: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    new = onnx.ValueInfoProto()
    new.CopyFrom(info)
    new.name = name
    return new


def _signature(opened: Opened, body: onnx.GraphProto, alias: Alias, into: onnx.GraphProto) -> None:
    """Names and types of what a body takes and gives; shapes are kept with those of the graph."""
    into.name, into.doc_string = body.name, body.doc_string
    into.metadata_props.extend(body.metadata_props)
    for values, kept in ((body.input, into.input), (body.output, into.output)):
        for value in values:
            name = alias.get(value.name, value.name)
            if value.name in alias.maps[0] and value.HasField("type"):
                opened.infos.append(_renamed(value, name))
            bare = _renamed(value, name)
            tensor = bare.type.tensor_type
            if any(dim.dim_value != 1 for dim in tensor.shape.dim):  # single numbers stay so
                tensor.ClearField("shape")
            kept.append(bare)


def close_bodies(
    nodes: Sequence[onnx.NodeProto], infos: Sequence[onnx.ValueInfoProto]
) -> tuple[list[onnx.NodeProto], list[onnx.ValueInfoProto]]:
    """The nodes with every body in its place again, and the shapes of what is outside of bodies."""
    known = {info.name: info for info in infos}
    regions: list[list[onnx.NodeProto]] = [[]]
    enters: list[onnx.NodeProto] = []
    for node in nodes:
        if not is_open(node):
            regions[-1].append(node)
        elif node.op_type == ENTER:
            enters.append(node)
            regions.append([])
        else:
            signatures = [a for a in node.attribute if a.type == AttributeProto.GRAPH]
            count = len(signatures)
            mine = list(zip(signatures, enters[-count:], regions[-count:], strict=True))
            del enters[-count:], regions[-count:]
            regions[-1].append(_closed(node, mine, known))
    return regions[0], list(known.values())


def _closed(
    node: onnx.NodeProto,
    parts: list[tuple[onnx.AttributeProto, onnx.NodeProto, list[onnx.NodeProto]]],
    known: dict[str, onnx.ValueInfoProto],
) -> onnx.NodeProto:
    """One control-flow node with its bodies; takes the infos of what is inside out of ``known``."""
    first = list(node.input).index(parts[0][1].output[0])
    result = helper.make_node(node.op_type, node.input[:first], node.output, node.name)
    while result.input and not result.input[-1]:
        del result.input[-1]
    result.doc_string = node.doc_string
    result.metadata_props.extend(node.metadata_props)
    result.attribute.extend(a for a in node.attribute if a.type != AttributeProto.GRAPH)
    position = first
    for signature, enter, inside in parts:
        given = node.input[position + 1 : position + 1 + len(signature.g.output)]
        position += 1 + len(given)
        attribute = result.attribute.add()
        attribute.name, attribute.type = signature.name, AttributeProto.GRAPH
        body = attribute.g
        body.name, body.doc_string = signature.g.name, signature.g.doc_string
        body.metadata_props.extend(signature.g.metadata_props)
        body.node.extend(inside)
        formal = list(enter.output[1:])
        for name, value in zip(formal, signature.g.input, strict=True):
            body.input.append(_renamed(known.pop(name, value), name))
        local = {name for inner in inside for name in inner.output if name}
        spare = local | set(formal)
        for name, value in zip(given, signature.g.output, strict=True):
            new = name
            if name not in spare:  # a body gives what it made itself, and each thing once
                new = f"{enter.output[0]}/{value.name}"
                body.node.append(helper.make_node("Identity", [name], [new], new))
            typed = known.pop(name, value) if name in spare else known.get(name, value)
            spare.discard(name)
            body.output.append(_renamed(typed, new))
        body.value_info.extend(known.pop(name) for name in sorted(local & known.keys()))
    return result


@dataclass(frozen=True)
class Parts:
    """A control-flow node's inputs by what they mean. ``bodies``: each body's token and outputs."""

    own: list[str]
    bodies: list[tuple[str, list[str]]]


def parts(node: onnx.NodeProto) -> Parts:
    """What an opened If, Loop or Scan reads."""
    signatures = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    names = list(node.input)
    position = len(names) - sum(1 + len(graph.output) for graph in signatures)
    own, found = names[:position], []
    for graph in signatures:
        stop = position + 1 + len(graph.output)
        found.append((names[position], names[position + 1 : stop]))
        position = stop
    return Parts(own, found)


def regions(nodes: Sequence[onnx.NodeProto]) -> list[tuple[str, ...]]:
    """For every node, the tokens of the bodies that it is in, the outermost first. A control-flow
    node is outside its own bodies, their ``Enter`` inside."""
    found = []
    inside: list[list[str]] = []  # backwards: of each node around, the bodies not yet passed
    for node in reversed(nodes):
        found.append(tuple(tokens[-1] for tokens in inside))
        if not is_open(node):
            continue
        if node.op_type != ENTER:
            inside.append([token for token, _ in parts(node).bodies])
            continue
        inside[-1].pop()
        if not inside[-1]:
            inside.pop()
    return found[::-1]
