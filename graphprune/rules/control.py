"""Control flow, laid open by ``graphprune.control``: what goes into a body and comes out of it.

Values keep their channels on the way: a Loop's state has the same ones before, in and after every
turn, both branches of an If give the same ones. Ties say so, hence a channel leaves on both sides
of a body's border or on neither. Where the two sides differ in shape, all that is carried is
pinned. What a body captures needs no rule: its readers are nodes like others.
"""

from __future__ import annotations

from collections.abc import Iterable

from graphprune.control import DOMAIN, parts
from graphprune.relations import Pin
from graphprune.rules.op import Op, Table
from graphprune.slots import Axis, SlotTensor

table = Table()

Slots = SlotTensor | None


@table.rule("Enter", domain=DOMAIN)
def enter(op: Op) -> None:
    """A body's own inputs: the state of a Loop or Scan, and one position of what a Scan reads."""
    kind = op.attr("of")
    formal = op.y[1:]
    _free(op, op.x)
    if kind == "Loop":
        for x, inner in zip(op.x[2:], formal[2:], strict=True):
            _carry(op, x, inner)
    elif kind == "Scan":
        states = len(op.x) - int(op.attr("num_scan_inputs"))
        for x, inner in zip(op.x[:states], formal[:states], strict=True):
            _carry(op, x, inner)
        axes = op.attr("scan_input_axes") or [0] * (len(op.x) - states)
        for x, inner, axis in zip(op.x[states:], formal[states:], axes, strict=True):
            _stack(op, inner, x, axis)


@table.rule("If", domain=DOMAIN)
def if_(op: Op) -> None:
    """Outputs are one branch's. A branch that the analysed sizes rule out says nothing where its
    shape does not fit."""
    _free(op, op.x[:1])
    outcome = op.value(0)
    then, other = _given(op)
    ruled_out = None
    if outcome is not None and outcome.size == 1:
        ruled_out = other if outcome.reshape(-1)[0] else then
    for branch in (then, other):
        for x, y in zip(branch, op.y, strict=True):
            fits = x is None or y is None or x.shape == y.shape
            if branch is ruled_out and x is not None and not fits:
                op.free(*x)
            else:
                _carry(op, x, y)


@table.rule("Loop", domain=DOMAIN)
def loop(op: Op) -> None:
    """State: the same before and after; further outputs have one position for each turn."""
    _free(op, op.x[:2])
    initial = op.x[2 : len(parts(op.node).own)]
    (given,) = _given(op)
    outcome, stacked = given[1 : 1 + len(initial)], given[1 + len(initial) :]
    for before, after, y in zip(initial, outcome, op.y, strict=False):
        _carry(op, before, after)
        _carry(op, after, y)
    for x, y in zip(stacked, op.y[len(initial) :], strict=False):
        _stack(op, x, y, 0)


@table.rule("Scan", domain=DOMAIN)
def scan(op: Op) -> None:
    """As Loop; outputs are stacked along axes of their own."""
    own = len(parts(op.node).own)
    states = own - int(op.attr("num_scan_inputs"))
    _free(op, op.x[states:own])
    (given,) = _given(op)
    for before, after, y in zip(op.x[:states], given[:states], op.y, strict=False):
        _carry(op, before, after)
        _carry(op, after, y)
    stacked = given[states:]
    axes = op.attr("scan_output_axes") or [0] * len(stacked)
    for x, y, axis in zip(stacked, op.y[states:], axes, strict=True):
        _stack(op, x, y, axis)


def _given(op: Op) -> list[tuple[Slots, ...]]:
    """What each body gives."""
    start, found = len(parts(op.node).own), []
    for _, names in parts(op.node).bodies:
        found.append(op.x[start + 1 : start + 1 + len(names)])
        start += 1 + len(names)
    return found


def _carry(op: Op, a: Slots, b: Slots) -> None:
    """The same value on both sides of a body's border; nothing where no one reads it there."""
    if a is None or b is None:
        return _free(op, (a, b))
    if a.shape == b.shape:
        return op.same(a, b)
    _pin(op, (*a, *b), "different or unknown shapes on the two sides of a body's border")


def _stack(op: Op, one: Slots, all_: Slots, axis: int) -> None:
    """``all_`` has ``one`` at each position along ``axis``."""
    if one is None or all_ is None:
        return _free(op, (one, all_))
    if all_.rank != one.rank + 1:
        return _pin(op, (*one, *all_), "stacked in an unknown shape")
    along = axis % all_.rank
    _pin(op, [all_[along]], "one position for each turn")
    rest = [other for other in all_ if other.index != along]
    for a, b in zip(one, rest, strict=True):
        op.tie(a, b)


def _free(op: Op, tensors: Iterable[Slots]) -> None:
    """Whatever else is said of them elsewhere."""
    for tensor in tensors:
        op.free(*(tensor or ()))


def _pin(op: Op, axes: Iterable[Axis], reason: str) -> None:
    """Pins named after the control-flow operator, on both borders of its bodies."""
    kind = op.attr("of") or op.type
    op.relations.pins += [Pin(axis.slots, f"{kind}: {reason}", op.index) for axis in axes]
