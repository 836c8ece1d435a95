"""One analysis of one model: shapes, relations, coupling and cost, computed once and shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.blocks import Block, find_blocks, names_in, state_blocks
from graphprune.cost import CostModel, cost_model
from graphprune.coupling import UNITS, USUAL_UNITS, Coupling, Mask, couple
from graphprune.errors import UsageError
from graphprune.model import Model, label
from graphprune.relations import Pin, Relations, Role
from graphprune.rules import BUILTIN, Rules, relate
from graphprune.shapes import Shape, Shapes, infer
from graphprune.slots import Axis, SlotArray
from graphprune.states import uncarried


@dataclass(frozen=True)
class Scope:
    """What the user lets the analysis touch: patterns on node and tensor names, kinds of units
    (``coupling.UNITS``), input sizes, states of the interface, slots that statistics are taken
    over; whether positions in groups may be aligned before it (``align_groups``), and whether what
    does nothing leaves first (``clean_up``); whether means of experts stay (``stand_in_experts``).
    ``given`` are the nodes that the user knows: patterns
    may name those that are gone by now."""

    protect: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    input_shapes: Mapping[str, Shape] | None = None
    units: tuple[str, ...] = USUAL_UNITS
    interface: bool = False
    inexact: bool = False
    aligned: bool = True
    lossless: bool = True
    means: bool = False
    given: tuple[onnx.NodeProto, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Analysis:
    """Everything later stages read about a model."""

    model: Model
    shapes: Shapes
    coupling: Coupling
    cost: CostModel
    blocks: tuple[Block, ...] = ()  # residual blocks, where they are among the units

    @property
    def relations(self) -> Relations:
        return self.coupling.relations

    @property
    def nothing_removed(self) -> Mask:
        return np.zeros(self.coupling.n_units, dtype=bool)

    def idle(self, removed: Mask) -> Mask:
        """Units that only blocks among ``removed`` are made of: what else leaves says nothing."""
        units = self.coupling.blocks
        pairs = zip(self.relations.branches, units.tolist(), strict=True)
        gone = {node for branch, u in pairs if u >= 0 and removed[u] for node in branch.nodes}
        found = self.nothing_removed
        for group in self.coupling.groups if gone else ():
            readers = {i for name, _ in group.signature for i, _ in self.model.consumers[name]}
            found[group.units] = readers <= gone
        return found


@dataclass(frozen=True)
class PinnedReason:
    """Why some parameter axes stay: the reason, where, and what share of the MACs they touch: those
    of operators whose rows or columns they are, half for each, so that reasons add up."""

    reason: str
    where: str
    axes: int
    channels: int
    macs: float


@dataclass(frozen=True)
class Inexact:
    """A group of which units leave although statistics are taken over their slots, and where."""

    index: int
    group: str
    units: int
    reason: str
    where: str


def analyse(model: Model, scope: Scope | None = None, rules: Rules = BUILTIN) -> Analysis:
    """Shapes, then every node's rule, then the coupling, then the cost. Reads no large weight."""
    scope = scope or Scope()
    _check_units(scope.units)
    shapes = infer(model, scope.input_shapes)
    relations = relate(model, shapes, rules)
    blocks = find_blocks(model, shapes, relations) if "blocks" in scope.units else ()
    state_blocks(blocks, relations)
    coupling = couple(
        model,
        shapes,
        relations,
        held=_protected(model, scope, relations, blocks),
        allowed=_allowed(model, scope, relations, blocks),
        units=scope.units,
        interface=scope.interface,
        inexact=scope.inexact,
    )
    return Analysis(model, shapes, coupling, cost_model(model, shapes, coupling), blocks)


def _check_units(units: Sequence[str]) -> None:
    wrong = [name for name in units if name not in UNITS]
    if wrong or not units:
        named = f"{wrong[0]!r} is no kind of unit" if wrong else "no kind of unit is named"
        raise UsageError(f"--units: {named}", hint=f"Some of: {', '.join(UNITS)}.")


def _protected(
    model: Model, scope: Scope, relations: Relations, blocks: Sequence[Block]
) -> list[Pin]:
    """Pins on every tensor that matches, on all that a matching node reads or writes, and on every
    block with such a node or tensor in it."""
    nodes, tensors = matching(model, scope.protect, "--protect", scope.given)
    names = tensors | {name for node in nodes for name in (*node.input, *node.output)}
    found = [
        relations.slots.tensors[name] for name in sorted(names & relations.slots.tensors.keys())
    ]
    pins = [Pin(axis.slots, "--protect", -1) for tensor in found for axis in tensor]
    named = tensors | {label(node) for node in nodes}
    return pins + [
        Pin(branch.slots, "--protect", -1)
        for branch, block in zip(relations.branches, blocks, strict=True)
        if named & names_in(block, model)
    ]


def _allowed(
    model: Model, scope: Scope, relations: Relations, blocks: Sequence[Block]
) -> list[SlotArray] | None:
    """Slots that --only names: what matching nodes write, and matching tensors; a weight's rows.
    A block is named where all its nodes with multiply-accumulates are."""
    if not scope.only:
        return None
    nodes, tensors = matching(model, scope.only, "--only", scope.given)
    names = {name for node in nodes for name in node.output}
    names |= {name for name in tensors if name not in model.constant_names}
    rows = [
        slots
        for slots, role in relations.roles
        if role in (Role.PRODUCER, Role.SCALE)
        for name in tensors & model.constant_names & relations.slots.tensors.keys()
        if any(axis.slots is slots for axis in relations.slots.tensors[name])
    ]
    working = {macs.node for macs in relations.macs}
    written = {i for i, node in enumerate(model.nodes) if names.intersection(node.output)}
    rows += [
        branch.slots
        for branch, block in zip(relations.branches, blocks, strict=True)
        if working.intersection(block.nodes) <= written
    ]
    known = names & relations.slots.tensors.keys()
    return rows + [a.slots for name in sorted(known) for a in relations.slots.tensors[name]]


def matching(
    model: Model, patterns: Sequence[str], option: str, given: Sequence[onnx.NodeProto] = ()
) -> tuple[list[onnx.NodeProto], set[str]]:
    """Nodes and tensors that any of the patterns names; each pattern must name something. Nodes
    that are ``given`` stand for themselves where the model has none of their name."""
    names = {label(node) for node in model.nodes} | set(model.initializers)
    names |= {output for node in model.nodes for output in node.output if output}
    names |= {value.name for value in model.inputs}
    gone = [node for node in given if label(node) not in names]
    names |= {label(node) for node in gone}
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise UsageError(
                f"{option} {pattern!r} matches no node and no tensor",
                hint=f"Patterns are like 'layer1*'. {_near(pattern, names)}",
            )
        found |= matched
    return [node for node in (*model.nodes, *gone) if label(node) in found], found


def _near(pattern: str, names: set[str]) -> str:
    bare = pattern.strip("*")
    near = [name for name in sorted(names) if bare and bare.lower() in name.lower()]
    near = near or get_close_matches(bare, sorted(names), n=3, cutoff=0.5) or sorted(names)
    return f"Names here are like {', '.join(map(repr, near[:3]))}."


def pinned_reasons(analysis: Analysis) -> list[PinnedReason]:
    """Pinned parameter axes by reason, most MACs first. Each weight counts with its rows."""
    coupling, model = analysis.coupling, analysis.model
    macs = analysis.cost.per_node_macs(analysis.nothing_removed, len(model.nodes))
    total = max(float(macs.sum()), 1.0)
    table: dict[str, list[tuple[Axis, Pin, float]]] = {}
    weights = [axis for axis in coupling.parameters if _is_side(coupling, axis)]
    size = {
        axis.tensor: float(np.prod(analysis.shapes.shape[axis.tensor] or ())) for axis in weights
    }
    read = np.zeros(len(model.nodes))  # elements: a recurrent node has two weights
    for name, elements in size.items():
        read[list({i for i, _ in model.consumers[name] if i >= 0})] += elements
    for axis in weights:
        stuck = axis.slots[coupling.unit_of(axis.slots) < 0]
        pin = coupling.pin_of(int(stuck[0])) if len(stuck) else None
        if pin is None:
            continue
        own = size[axis.tensor]
        readers = [i for i, _ in model.consumers[axis.tensor] if i >= 0]
        share = max((macs[i] * own / read[i] for i in readers), default=0.0)
        share *= len(stuck) / len(axis) / 2 / total  # a weight has rows and columns: half each
        table.setdefault(pin.reason, []).append((axis, pin, share))
    rows = [_reason_row(model, reason, entries) for reason, entries in table.items()]
    rows += _without_roles(analysis, macs / total)
    return sorted(rows, key=lambda row: (-row.macs, -row.channels, row.reason))


def _is_side(coupling: Coupling, axis: Axis) -> bool:
    """Whether it is the rows or the columns of a weight."""
    role = Role(int(np.bincount(coupling.role[axis.slots], minlength=5).argmax()))
    return role in (Role.PRODUCER, Role.CONSUMER)


def inexact(analysis: Analysis, removed: Mask) -> list[Inexact]:
    """What leaves with a shift where ``removed`` does, by group."""
    coupling = analysis.coupling
    group_of = np.full(coupling.n_units + 1, -1)
    for group in coupling.groups:
        group_of[group.units[removed[group.units]]] = group.index
    found: dict[int, list[Pin]] = {}
    units: dict[int, set[int]] = {}
    for pin in coupling.relations.shifts:
        gone = np.unique(coupling.unit_of(pin.slots))
        for index in np.unique(group_of[gone]).tolist():
            found.setdefault(index, []).append(pin)
            units.setdefault(index, set()).update(gone[group_of[gone] == index].tolist())
    return [
        Inexact(
            index,
            coupling.groups[index].name,
            len(units[index]),
            pins[0].reason,
            _where(analysis.model, [pin.node for pin in pins]),
        )
        for index, pins in sorted(found.items())
        if index >= 0
    ]


def allowances(analysis: Analysis) -> str:
    """The options that would let some of what is pinned leave, as a sentence; empty where none."""
    relations = analysis.relations
    left = uncarried(analysis.model, analysis.shapes, relations, analysis.coupling.parameters)
    kept = {(pin.reason, len(pin.slots)) for pin in left}
    states = [pin for pin in relations.interface if (pin.reason, len(pin.slots)) not in kept]
    held = {pin.reason for pin in pinned_reasons(analysis)}
    found = [
        f"{option} ({reasons[0]})"
        for option, pins in (
            ("--allow-inexact", relations.shifts),
            ("--allow-interface-change", states),
        )
        if (reasons := [pin.reason for pin in pins if pin.reason in held])
    ]
    return f"More may leave with {' or with '.join(found)}. " if found else ""


def _without_roles(analysis: Analysis, share: NDArray[np.float64]) -> list[PinnedReason]:
    """Nodes with weights of which the rule named no rows or columns (recurrence, say)."""
    coupling, model = analysis.coupling, analysis.model
    spoken = {
        i
        for axis in coupling.parameters
        if coupling.role[axis.slots].any()
        for i, _ in model.consumers[axis.tensor]
    }
    weighted = {i for axis in coupling.parameters for i, _ in model.consumers[axis.tensor]}
    by_reason: dict[str, list[int]] = {}
    for node in sorted(weighted - spoken):
        pin = next((p for p in coupling.relations.pins if p.node == node), None)
        if pin is not None and share[node] > 0:
            by_reason.setdefault(pin.reason, []).append(node)
    return [
        PinnedReason(reason, _where(model, nodes), 0, 0, float(share[nodes].sum()))
        for reason, nodes in by_reason.items()
    ]


def _where(model: Model, nodes: Sequence[int]) -> str:
    names = list(dict.fromkeys(label(model.nodes[node]) for node in nodes))
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)


def _reason_row(model: Model, reason: str, entries: list[tuple[Axis, Pin, float]]) -> PinnedReason:
    where = _where(model, [pin.node for _, pin, _ in entries if pin.node >= 0])
    channels = sum(len(axis) for axis, _, _ in entries)
    return PinnedReason(reason, where, len(entries), channels, float(sum(e[2] for e in entries)))
