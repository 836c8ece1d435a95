"""Where an operator is to match the original, and the rows that say how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from graphprune.bypass import only_reader, past_blocks
from graphprune.calibrate.samples import HELD_OUT
from graphprune.frontier import Frontier
from graphprune.linear import Linear, Matrix
from graphprune.model import Array, Model
from graphprune.oracle import sliced
from graphprune.repair.damage import Damage
from graphprune.shapes import Shape
from graphprune.statistics import Sums, chunk_rows, rows_wanted
from graphprune.unfold import inputs_at, positions


class Pieces(Protocol):
    """One tensor's values, chunk by chunk."""

    def __getitem__(self, index: int, /) -> Any: ...


class Known(Protocol):
    """Activations by tensor name, as a ``Frontier`` holds them."""

    @property
    def chunks(self) -> int: ...

    def __getitem__(self, name: str, /) -> Pieces: ...


@dataclass(frozen=True)
class Site:
    """An operator to repair: it is to give ``target``, less ``stream`` that is added to it."""

    linear: Linear
    target: str | None  # of the original; None: a recurrent node's gates, which no tensor holds
    stream: str | None  # of the pruned model
    rectified: bool  # only a Relu reads the target: what is below zero need not be matched
    original: Linear | None = None  # what computes the gates that are no tensor


def site_of(
    model: Model,
    shapes: Mapping[str, Shape | None],
    linear: Linear,
    after: Frontier,
    left: set[int],
    originals: Mapping[str, Linear],
) -> Site:
    """Where to match the original. An operator whose output y is only added to a tensor s that is
    known already is to give z - s, z being the original's sum: that also corrects what has gone
    wrong on the other branch, a residual stream for instance. Where blocks have left right behind
    that, it is to give what they gave (ReplaceMe, arXiv 2505.02819, with the whole operator solved
    anew in place of a further matrix folded into it).
    """
    if linear.y is None:
        return Site(linear, None, None, False, originals[linear.weight])
    target, stream = linear.y, None
    constants = model.constant_names
    term = past_rounding(model, linear.y)
    reader = only_reader(model, term)
    if reader is not None and reader.op_type == "Add" and not reader.domain:
        others = [name for name in reader.input if name != term and name not in constants]
        grown = shapes.get(reader.output[0]) != shapes.get(linear.y)  # it is broadcast
        if others and not grown and after.reaches(others[0], left):
            target, stream = reader.output[0], others[0]
    target = past_blocks(model, target)
    return Site(linear, target, stream, _rectified(model, target))


def past_rounding(model: Model, name: str) -> str:
    """What ``name`` is once it has been an integer, where nothing else reads it."""
    rounding = only_reader(model, name)
    if rounding is None or rounding.op_type != "QuantizeLinear":
        return name
    reading = only_reader(model, rounding.output[0])
    if reading is None or reading.op_type != "DequantizeLinear":
        return name
    return reading.output[0] if reading.input[1:] == rounding.input[1:] else name


def _rectified(model: Model, name: str) -> bool:
    """Whether only what is above zero counts: a Relu, or integers that have no place below."""
    reader = only_reader(model, name)
    if reader is not None and reader.op_type == "QuantizeLinear" and len(reader.input) > 2:
        zero = reader.input[2]
        if zero in model.initializers:
            point = model.array(zero)
            if point.dtype.kind in "iu" and (point == np.iinfo(point.dtype).min).all():
                return True
        reader = only_reader(model, past_rounding(model, name))
    return reader is not None and reader.op_type == "Relu"


def sums_of(
    damage: Damage,
    site: Site,
    before: Known,
    after: Known,
    guess: tuple[Matrix, Matrix] | None = None,
) -> tuple[Sums, Sums]:
    """Sums over the chunks to fit, and over those held out.

    With a ``guess`` (weights and bias) targets below zero, which a Relu is to hide, are replaced by
    what the guess gives there, at most zero (after Zhang et al., arXiv 1505.06798, section 2.2);
    the inputs' own products, which that does not change, are left out.
    """
    both: tuple[Sums, Sums] | None = None
    for chunk in range(after.chunks):
        for x, targets, streams in rows_of(damage, site, before, after, chunk):
            wanted = targets
            if guess is not None:
                now = x @ guess[0].transpose(0, 2, 1).astype(np.float32)
                now += guess[1][:, None].astype(np.float32)
                hidden = targets + streams <= 0
                wanted = np.where(hidden, np.minimum(now, -streams), targets)
            if both is None:
                both = (
                    Sums.empty(x, wanted, gram=guess is None),
                    Sums.empty(x, wanted, gram=guess is None),
                )
            both[chunk % HELD_OUT == HELD_OUT - 1].add(x, wanted)
    assert both is not None
    return both


def rows_of(
    damage: Damage, site: Site, before: Known, after: Known, chunk: int
) -> Iterator[tuple[Array, Array, Array]]:
    """Blocks of inputs, targets for the operator itself, and what is added to it."""
    linear = site.linear
    if site.original is not None:
        yield *_gates(damage, site.original, linear, before, after, chunk), np.zeros((), np.float32)
        return
    assert site.target is not None
    x = after[linear.x][chunk]
    wanted = before[site.target][chunk]
    target = sliced({site.target: wanted}, damage.coupling, damage.alive)[site.target]
    seed = (damage.seed, linear.node, chunk)
    if site.stream is None:
        for rows, targets in chunk_rows(linear, x, target, after.chunks, seed):
            yield rows, targets, np.zeros((), np.float32)
        return
    stream = np.broadcast_to(after[site.stream][chunk], target.shape)
    pairs = zip(
        chunk_rows(linear, x, target - stream, after.chunks, seed),
        chunk_rows(linear, x, stream, after.chunks, seed),
        strict=True,
    )
    for (rows, targets), (_, streams) in pairs:
        yield rows, targets, streams


def _gates(
    damage: Damage, original: Linear, linear: Linear, before: Known, after: Known, chunk: int
) -> tuple[Array, Array]:
    """Inputs of recurrent weights, and the gates that the original computes from its own.

    Recurrent weights are to do with the original's states, as far as these are still there, what
    they did with all of them: states of the pruned model depend on the very weights in question.
    """
    x = before[original.x][chunk]
    most = max(1, rows_wanted(x.shape[-1]) // before.chunks)
    where = positions(original, x.shape, most, (damage.seed, linear.node, chunk))
    rows = inputs_at(original, x, x.shape, where)
    matrix = original.matrix(damage.original)
    bias = original.offset(damage.original, matrix.shape[0] * matrix.shape[1])
    targets = (rows @ matrix.transpose(0, 2, 1) + bias[:, None]).astype(np.float32)
    _, gates, inputs = damage.coupling.relations.slots.tensors[linear.weight]
    kept = np.tile(damage.alive[gates.slots], matrix.shape[1] // len(gates))
    if linear.reverse:
        return rows[..., damage.alive[inputs.slots]], targets[..., kept]
    now = after[linear.x][chunk]
    return inputs_at(linear, now, now.shape, where), targets[..., kept]
