"""Units that can leave without changing what a model computes.

By law 3 a unit acts on others through contractions alone. So it is idle where at each of them what
it is multiplied with is zero (nobody reads it), or it is itself zero, or a constant that the
reader's bias can take over. Where a constant meets zero padding, which no bias repeats, one
constant channel can stand for all others; and of channels that are equal one can stand for the
rest: their columns are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from graphprune.analysis import Analysis
from graphprune.choices import standing
from graphprune.control import is_open, regions
from graphprune.coupling import Group, Mask
from graphprune.facts import Facts, Line
from graphprune.facts.fact import mixed
from graphprune.layout import FREE, blocks
from graphprune.linear import RECURRENT, Linear, linears
from graphprune.model import Array
from graphprune.relations import Contraction
from graphprune.rewriting import Change
from graphprune.slots import SlotArray
from graphprune.targets import builtin
from graphprune.unread import unread_units

DEAD, CONSTANT, DUPLICATE = 1, 2, 3  # why a unit may leave
GLANCE = 8  # rows that tell most columns with something in them
ALIGNED = 4  # channels of a convolution come in multiples of this, or lose the blocked layout
WIDEST_BLOCKS = "cpu-avx512"  # what stays in blocks there stays in them everywhere
ONE = np.uint64(1)  # kind of all constants that are not zero

Units = NDArray[np.int64]
Numbers = NDArray[np.uint64]


@dataclass(frozen=True)
class Idle:
    """Which units leave, why (``DEAD``, ``CONSTANT``, ``DUPLICATE``), how many stay for the sake of
    the runtime's layout or because something must, and what readers get for them."""

    removed: Mask
    why: NDArray[np.int8]  # by unit; 0 where it is not idle
    edits: tuple[Change, ...]


@dataclass(frozen=True)
class _Read:
    """A contraction, by slot: its unit, whether zero is read, the constant read (else NaN), its
    kind (0 where it adds nothing), and how the reader's weights can be rewritten."""

    units: Units
    zero: Mask
    value: NDArray[np.float64]
    kind: Numbers
    linear: Linear | None
    plain: bool  # whether a constant makes the same sum everywhere


def idle_units(analysis: Analysis, facts: Facts) -> Idle:
    """Find them; what must stay for a whole to remain stays."""
    coupling = analysis.coupling
    unread = unread_units(analysis.model, coupling)
    reads = list(_reads(analysis, facts, unread))
    inside = _in_bodies(analysis)  # where readers are not rewritten
    usable = _usable(analysis, reads, unread) & ~(inside & unread)
    nothing, fixed = usable.copy(), usable & ~inside  # adds nothing; adds a constant at most
    for read in reads:
        mine = read.units >= 0
        nothing[read.units[mine & ~read.zero]] = False
        foldable = read.zero | (~np.isnan(read.value) & read.plain)
        fixed[read.units[mine & ~foldable]] = False
    why = np.zeros(coupling.n_units, np.int8)
    why[fixed] = CONSTANT
    why[nothing] = DEAD
    stands_for = _duplicates(analysis, reads, usable & (why == 0) & ~inside)
    gains = stands_for != np.arange(coupling.n_units)
    why[gains] = np.where(_constant(reads, coupling.n_units)[gains], CONSTANT, DUPLICATE)
    removed = _with_enough_left(analysis, why)
    edits = tuple(_edits(analysis, reads, removed, stands_for))
    return Idle(removed, why, edits)


def _usable(analysis: Analysis, reads: list[_Read], unread: Mask) -> Mask:
    """Units that something reads, outside of the interface and of statistics; and those that no
    output depends on."""
    coupling = analysis.coupling
    usable = np.append(unread, False)
    for read in reads:
        usable[read.units] = True
    relations = coupling.relations
    banned = [pin.slots for pin in (*relations.shifts, *relations.interface)]
    for slots in banned:
        usable[coupling.unit_of(slots)] = False
    return usable[:-1]


def _in_bodies(analysis: Analysis) -> Mask:
    """Units that bodies of control flow hold, or that go in or out of one."""
    coupling, tensors = analysis.coupling, analysis.relations.slots.tensors
    found = np.zeros(coupling.n_units + 1, bool)
    nodes = analysis.model.nodes
    for node, inside in zip(nodes, regions(nodes), strict=True):
        if inside or is_open(node):
            for name in tensors.keys() & {*node.input, *node.output}:
                for axis in tensors[name]:
                    found[coupling.unit_of(axis.slots)] = True
    return found[:-1]


def _reads(analysis: Analysis, facts: Facts, unread: Mask) -> Iterator[_Read]:
    model = analysis.model
    rewritable = _rewritable(analysis, facts)
    for contraction in analysis.relations.contractions:
        units = analysis.coupling.unit_of(contraction.slots)
        if not (units >= 0).any():
            continue
        node = model.nodes[contraction.node]
        name = node.input[contraction.input]
        size = len(units)
        zero = np.append(unread, False)[units]  # what is made of it is not read either
        if contraction.quantised is not None:
            yield _Read(units, zero, np.full(size, np.nan), _own(size, len(units)), None, False)
            continue
        if name in model.constant_names:
            recurrent = node.op_type in RECURRENT and contraction.input == 2
            weight = facts.constant(name)
            if weight is not None and weight.dtype.kind == "f":
                zero |= _empty_columns(weight, contraction.axis, recurrent)
        else:
            line = facts.line(name, contraction.axis)
            zero |= line is not None and line.value == 0
        partner = _partner(analysis, facts, contraction)
        value = np.full(size, np.nan) if partner is None else partner.value
        zero |= value == 0
        linear = rewritable.get((contraction.node, name))
        if linear is not None and linear.groups > 1 and linear.kind not in RECURRENT:
            linear = None
        plain = linear is not None and _plain(analysis, linear)
        kind = _kinds(contraction, zero, value, partner, linear, plain)
        yield _Read(units, zero, value, kind, linear, plain)


def _rewritable(analysis: Analysis, facts: Facts) -> dict[tuple[int, str], Linear]:
    """Linear operators by node and weight. Weights that nodes compute (from transposed ones, say)
    are among them only where constants or duplicates are read: each would be computed here."""
    model = analysis.model
    names = set(model.initializers)
    if analysis.relations.quantised or analysis.relations.dequantised:
        return {(linear.node, linear.weight): linear for linear in linears(model)}
    for contraction in analysis.relations.contractions:
        name = model.nodes[contraction.node].input[contraction.input]
        if name in names or name not in model.constant_names:
            continue
        if not (analysis.coupling.unit_of(contraction.slots) >= 0).any():
            continue
        line = _partner(analysis, facts, contraction)
        if line is not None and (_repeats(line) or (line.value != 0).any(where=line.known)):
            names.add(name)
    return {(linear.node, linear.weight): linear for linear in linears(model, names)}


def _repeats(line: Line) -> bool:
    return line.kind is not None and len(np.unique(line.kind)) < len(line.kind)


def _kinds(
    contraction: Contraction,
    zero: Mask,
    value: NDArray[np.float64],
    partner: Line | None,
    linear: Linear | None,
    plain: bool,
) -> Numbers:
    """What a slot must have in common with another one to be added to it."""
    own = _own(len(zero), contraction.node)
    if linear is None:
        return np.where(zero, np.uint64(0), own)
    kinds = own if partner is None or partner.kind is None else partner.kind
    kinds = np.where(zero & (kinds == own), np.uint64(0), kinds)
    constant = ~np.isnan(value)
    kinds = np.where(constant, np.uint64(0) if plain else ONE, kinds)
    return np.where(value == 0, np.uint64(0), kinds)


def _own(size: int, salt: int) -> Numbers:
    """A kind of its own for each slot."""
    return mixed(np.uint64(salt), np.arange(size, dtype=np.uint64))


def _partner(analysis: Analysis, facts: Facts, contraction: Contraction) -> Line | None:
    """What the contraction's input is multiplied with; of recurrent weights, the node's states."""
    node = analysis.model.nodes[contraction.node]
    if contraction.partner is not None:
        return facts.line(contraction.partner.tensor, contraction.partner.index)
    if node.op_type not in RECURRENT or contraction.input != 2:
        return None
    name = next((output for output in node.output if output), "")
    shape = analysis.shapes.shape.get(name)
    return None if shape is None else facts.line(name, len(shape) - 1)


def _empty_columns(weight: Array, axis: int, recurrent: bool) -> Mask:
    """Which positions along ``axis`` hold nothing but zeros; the first rows tell most that do not.
    A recurrent unit that only reads itself is not read."""
    if recurrent:
        hidden = weight.shape[2]
        filled = (weight != 0).reshape(-1, hidden, hidden)
        filled[:, np.arange(hidden), np.arange(hidden)] = False
        return np.asarray(~filled.any(axis=(0, 1)))
    front = np.moveaxis(weight, axis, 0)
    glance = front[(slice(None), *(slice(0, GLANCE) for _ in front.shape[1:]))]
    empty = ~(glance != 0).any(axis=tuple(range(1, front.ndim)))
    maybe = np.flatnonzero(empty)
    empty[maybe] = ~(front[maybe] != 0).any(axis=tuple(range(1, front.ndim)))
    return np.asarray(empty)


def _plain(analysis: Analysis, linear: Linear) -> bool:
    """Whether a constant channel adds the same to every place of the output: no edge cuts it."""
    if linear.kind not in ("Conv", "ConvTranspose"):
        return True
    said = {a.name: a for a in analysis.model.nodes[linear.node].attribute}
    ones = linear.taps == 1
    padded = any(helper.get_attribute_value(said["pads"])) if "pads" in said else False
    if linear.kind == "ConvTranspose":
        more = any(key in said for key in ("output_padding", "output_shape"))
        return ones and set(linear.strides) <= {1} and not padded and not more
    return not padded and (ones or linear.auto_pad in ("NOTSET", "VALID"))


def _duplicates(analysis: Analysis, reads: list[_Read], candidates: Mask) -> Units:
    """For each unit the one that can stand for it: read at the same places, where it is the same
    (or a constant too); the unit itself where no other can."""
    total = np.zeros(analysis.coupling.n_units, np.uint64)
    for number, read in enumerate(reads):
        mine = np.flatnonzero(read.units >= 0)
        units = read.units[mine]
        parts = mixed(np.uint64(number), _ranks(units), read.kind[mine])
        np.add.at(total, units, np.where(read.kind[mine] == 0, np.uint64(0), parts))
    found = np.arange(analysis.coupling.n_units)
    for group in analysis.coupling.groups:
        units = group.units[candidates[group.units]]
        _, first, inverse = np.unique(total[units], return_index=True, return_inverse=True)
        found[units] = units[first[inverse.reshape(-1)]]
    return found


def _ranks(units: Units) -> Numbers:
    """How many slots of the same unit came before, for each slot."""
    order = np.argsort(units, kind="stable")
    counts = np.unique(units[order], return_counts=True)[1]
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    ranks = np.empty(len(units), np.uint64)
    ranks[order] = np.arange(len(units)) - starts
    return ranks


def _constant(reads: list[_Read], n_units: int) -> Mask:
    """Which units are constants, or zero, wherever they are read."""
    constant = np.ones(n_units + 1, bool)
    for read in reads:
        constant[read.units[np.isnan(read.value) & ~read.zero]] = False
    return constant[:-1]


def _with_enough_left(analysis: Analysis, why: NDArray[np.int8]) -> Mask:
    """The idle units but those that must stay: one of every axis, and counts of convolutions that
    keep the runtime's blocked layout (a channel less would cost more time than it saves)."""
    coupling = analysis.coupling
    removed = why > 0
    if not removed.any():
        return removed
    steps = blocks(analysis, builtin()[WIDEST_BLOCKS])
    for group in coupling.groups:
        idle = group.units[removed[group.units]]
        if not len(idle):
            continue
        held = steps.get(group.index, FREE)
        step = np.lcm(held.step, _alignment(analysis, group))
        left = len(group) - len(idle)
        least = held.least if group.index in steps else 0
        wanted = min(len(group), max(-(-left // step) * step, least))
        if len(group) % step and wanted > left:
            wanted = left  # outside the layout as it is
        back = sorted(idle.tolist(), key=lambda unit: (-why[unit], unit))[: wanted - left]
        removed[back] = False
    removed[_out_of_line(analysis, removed)] = False
    gone = ~coupling.alive(removed)
    for axis in standing(coupling.relations):
        if gone[axis.slots].all():
            units = coupling.unit_of(axis.slots)
            removed[units.min()] = False
            gone = ~coupling.alive(removed)
    return removed


def _out_of_line(analysis: Analysis, removed: Mask) -> list[int]:
    """Idle units that stay to make the count of a convolution's outputs a multiple again: those
    that some group does without may be any number."""
    model, coupling = analysis.model, analysis.coupling
    found: list[int] = []
    for axis in coupling.parameters:
        if axis.index or len(axis) % ALIGNED:
            continue
        if all(
            model.nodes[i].op_type != "Conv" or place != 1
            for i, place in model.consumers[axis.tensor]
        ):
            continue
        units = coupling.unit_of(axis.slots)
        gone = units[np.append(removed, False)[units]]
        found += np.unique(gone)[: -(len(axis) - len(gone)) % ALIGNED].tolist()
    return found


def _alignment(analysis: Analysis, group: Group) -> int:
    model = analysis.model
    for tensor, _ in group.signature:
        for i, place in model.consumers.get(tensor, ()):
            if model.nodes[i].op_type == "Conv" and place == 1 and len(group) % ALIGNED == 0:
                return ALIGNED
    return 1


def _edits(
    analysis: Analysis, reads: list[_Read], removed: Mask, stands_for: Units
) -> Iterator[Change]:
    """New weights and biases of what reads units that were not nothing."""
    for read in reads:
        gone = (read.units >= 0) & np.append(removed, False)[read.units] & ~read.zero
        if read.linear is None or not gone.any():
            continue
        linear = read.linear
        matrix = linear.matrix(analysis.model)
        rows = matrix.shape[0] * matrix.shape[1]
        offset = linear.offset(analysis.model, rows).copy()
        columns = matrix.copy().reshape(*matrix.shape[:2], -1, linear.taps)
        folded = np.flatnonzero(gone & read.plain & ~np.isnan(read.value))
        offset += (columns[:, :, folded].sum(axis=3) @ read.value[folded]).reshape(offset.shape)
        gone[folded] = False
        _add_columns(columns, read, np.flatnonzero(gone), stands_for)
        yield linear, columns.reshape(matrix.shape), offset


def _add_columns(
    columns: NDArray[np.float64], read: _Read, slots: SlotArray, stands_for: Units
) -> None:
    """Add the columns [groups, out, in, taps] of these slots, in place, to those of the units that
    stand for theirs; of constants as many times as theirs go into them."""
    if not len(slots):
        return
    others = _other_slots(read, slots, stands_for)
    order = np.argsort(others, kind="stable")
    slots, others = slots[order], others[order]
    constant = ~np.isnan(read.value[slots])
    share = np.ones(len(slots))
    share[constant] = read.value[slots[constant]] / read.value[others[constant]]
    to, starts = np.unique(others, return_index=True)
    columns[:, :, to] += np.add.reduceat(columns[:, :, slots] * share[:, None], starts, axis=2)


def _other_slots(read: _Read, slots: SlotArray, stands_for: Units) -> SlotArray:
    """Where the units that stand for those of these slots are read: the first slot of a unit goes
    with the first of the other one, and so on."""
    order = np.argsort(read.units, kind="stable")
    first = np.searchsorted(read.units[order], stands_for[read.units[slots]])
    return order[first + _ranks(read.units)[slots].astype(np.int64)]
