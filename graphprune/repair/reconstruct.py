"""Repair by reconstruction: every linear operator downstream of a cut, in topological order, is
solved to give the original's outputs from the inputs that it has now (the asymmetric affine form of
the OBS update, with a ridge towards the sliced weights)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from graphprune.bypass import only_reader, past_blocks, stands_for_sum
from graphprune.calibrate.samples import HELD_OUT
from graphprune.frontier import Frontier
from graphprune.interface import reshaped
from graphprune.least_squares import Ridged, best_ridge, error
from graphprune.linear import (
    RECURRENT,
    Linear,
    Matrix,
    repairable,
    rewritten,
    stored,
)
from graphprune.model import Array, Model, captured, label
from graphprune.oracle import sliced
from graphprune.repair.damage import Damage, Repaired
from graphprune.selectors import is_selector
from graphprune.shapes import Shape
from graphprune.statistics import Sums, chunk_rows, rows_wanted
from graphprune.unfold import inputs_at, positions

CONSTANT = 1e-10  # variance over squared mean below which an output does not vary at all
WIDEST = 12288  # columns of a Gram matrix: a wider operator gets its mean output corrected alone
AFFINE, BIAS = "affine", "bias"
STEPS_DIFFER = "the mean of a recurrent operator's gates is that of none of its steps"


@dataclass(frozen=True)
class _Site:
    """An operator to repair: it is to give ``target``, less ``stream`` that is added to it."""

    linear: Linear
    target: str | None  # of the original; None: a recurrent node's gates, which no tensor holds
    stream: str | None  # of the pruned model
    rectified: bool  # only a Relu reads the target: what is below zero need not be matched
    original: Linear | None = None  # what computes the gates that are no tensor


def reconstruct(damage: Damage, form: str = AFFINE) -> tuple[Model, tuple[Repaired, ...]]:
    """The pruned model with repaired weights, and what each repair did.

    ``form`` is "affine" (weights and bias) or "bias" (mean outputs alone).
    """
    work = with_biases(damage.pruned)
    dirty = dirty_tensors(damage.original, work)
    todo = [
        linear
        for linear in repairable(work)
        if (linear.x in dirty and not _keeps_all(damage, linear)) or _before_block(work, linear)
    ]
    originals = {linear.weight: linear for linear in repairable(damage.original)}
    before = Frontier(damage.original, damage.feeds, damage.memory / 2)
    after = Frontier(work, damage.feeds, damage.memory / 2)
    left = {linear.node for linear in todo}
    changed, reports, targets = [], [], set[str | None]()
    for number, linear in enumerate(todo):
        damage.progress(number / len(todo))
        if form == BIAS and linear.kind in RECURRENT:
            reports.append(
                Repaired(label(work.nodes[linear.node]), f"not repaired: {STEPS_DIFFER}")
            )
            left.discard(linear.node)
            continue
        site = _site(work, damage.shapes.shape, linear, after, left, originals)
        before.advance([site.target or linear.x])
        if not linear.reverse:
            after.advance([linear.x] + ([site.stream] if site.stream else []))
        targets.add(site.target)
        matrix, bias, report = _repaired(damage, work, site, before, after, form)
        changed.append((linear, matrix, bias))
        reports.append(report)
        after.weights |= stored(work, changed[-1], after.weights)
        left.discard(linear.node)
    by_weight = {linear.weight: linear for linear in repairable(damage.pruned)}
    final = [(by_weight[linear.weight], matrix, bias) for linear, matrix, bias in changed]
    return rewritten(damage.pruned, final), (*reports, *_not_replaced(work, targets))


def _not_replaced(model: Model, targets: set[str | None]) -> list[Repaired]:
    """Of the blocks that have left, those that nothing stands in for."""
    why = "not replaced: no linear operator ends right before the block that has left"
    gone = [node for node in model.nodes if stands_for_sum(node)]
    ends = [past_blocks(model, node.output[0]) for node in gone]
    return [
        Repaired(label(n), why) for n, end in zip(gone, ends, strict=True) if end not in targets
    ]


def _before_block(model: Model, linear: Linear) -> bool:
    """Whether blocks have left right behind this operator, or behind a sum it is added to."""
    if linear.y is None:
        return False
    reader = only_reader(model, linear.y)
    ends = [linear.y]
    if reader is not None and reader.op_type == "Add" and not reader.domain:
        ends.append(reader.output[0])
    return any(past_blocks(model, name) != name for name in ends)


def _keeps_all(damage: Damage, linear: Linear) -> bool:
    """Whether these are recurrent weights that read all the states they ever did: from the
    original's states, as they are repaired, nothing is to be gained."""
    if not linear.reverse:
        return False
    states = damage.coupling.relations.slots.tensors[linear.weight][linear.contracted_axis]
    return bool(damage.alive[states.slots].all())


def with_biases(model: Model) -> Model:
    """The model with a bias of zeros in every linear operator that has none."""
    bare = [linear for linear in repairable(model) if linear.bias is None]
    matrices = [linear.matrix(model) for linear in bare]
    zeros = [np.zeros(matrix.shape[:2]) for matrix in matrices]
    return rewritten(model, list(zip(bare, matrices, zeros, strict=True)))


def dirty_tensors(original: Model, pruned: Model) -> set[str]:
    """Tensors of ``pruned`` that a weight or a graph input of another shape reaches, or a sum that
    a block has left."""
    changed = {
        name
        for name, tensor in pruned.initializers.items()
        if name in original.initializers and original.initializers[name].dims != tensor.dims
    }
    changed.update(ends.name for ends in reshaped(original, pruned) if ends.side == "input")
    for node in pruned.nodes:
        if is_selector(node) and node.input[1] not in original.initializers:  # reads fewer
            changed.add(node.output[0])
        if stands_for_sum(node):
            changed.add(node.output[0])
        if changed.intersection(node.input) or changed & captured(node):
            changed.update(name for name in node.output if name)
    return changed


def _site(
    model: Model,
    shapes: Mapping[str, Shape | None],
    linear: Linear,
    after: Frontier,
    left: set[int],
    originals: Mapping[str, Linear],
) -> _Site:
    """Where to match the original. An operator whose output y is only added to a tensor s that is
    known already is to give z - s, z being the original's sum: that also corrects what has gone
    wrong on the other branch, a residual stream for instance. Where blocks have left right behind
    that, it is to give what they gave (ReplaceMe, arXiv 2505.02819, with the whole operator solved
    anew in place of a further matrix folded into it).
    """
    if linear.y is None:
        return _Site(linear, None, None, False, originals[linear.weight])
    target, stream = linear.y, None
    constants = model.constant_names
    reader = only_reader(model, linear.y)
    if reader is not None and reader.op_type == "Add" and not reader.domain:
        others = [name for name in reader.input if name != linear.y and name not in constants]
        grown = shapes.get(reader.output[0]) != shapes.get(linear.y)  # it is broadcast
        if others and not grown and after.reaches(others[0], left):
            target, stream = reader.output[0], others[0]
    target = past_blocks(model, target)
    reader = only_reader(model, target)
    return _Site(linear, target, stream, reader is not None and reader.op_type == "Relu")


def _repaired(
    damage: Damage, work: Model, site: _Site, before: Frontier, after: Frontier, form: str
) -> tuple[Matrix, Matrix, Repaired]:
    """Weights and bias of one operator, and how much nearer to the original they come."""
    linear = site.linear
    weights = linear.matrix(work)
    old = linear.offset(work, weights.shape[0] * weights.shape[1])
    name = label(work.nodes[linear.node])
    if form == BIAS or weights.shape[2] > WIDEST:
        means = _mean_error(damage, site, before, after, weights, old)
        return weights, old + means, Repaired(name, "bias")
    fit, held = _sums(damage, site, before, after)
    everything = fit.merged(held).centred()
    ridge = best_ridge(fit.centred(), held.centred(), weights)
    inputs = Ridged(everything, ridge)
    matrix, bias = inputs.solved(everything, weights)
    errors = []
    scale = float(everything.tt.sum())
    if scale > CONSTANT * float(np.square(everything.mean_t).sum()):
        errors = [error(everything, *pair) / scale for pair in ((weights, old), (matrix, bias))]
    if site.rectified:  # what lies below zero on both sides does not count: solve once more
        relaxed = _sums(damage, site, before, after, (matrix, bias))
        both = replace(relaxed[0].merged(relaxed[1]).centred(), xx=everything.xx)
        matrix, bias = inputs.solved(both, weights)
    return matrix, bias, Repaired(name, f"ridge {ridge:g}", *errors)


def _sums(
    damage: Damage,
    site: _Site,
    before: Frontier,
    after: Frontier,
    guess: tuple[Matrix, Matrix] | None = None,
) -> tuple[Sums, Sums]:
    """Sums over the chunks to fit, and over those held out.

    With a ``guess`` (weights and bias) targets below zero, which a Relu is to hide, are replaced by
    what the guess gives there, at most zero (after Zhang et al., arXiv 1505.06798, section 2.2);
    the inputs' own products, which that does not change, are left out.
    """
    both: tuple[Sums, Sums] | None = None
    for chunk in range(after.chunks):
        for x, targets, streams in _rows(damage, site, before, after, chunk):
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


def _rows(
    damage: Damage, site: _Site, before: Frontier, after: Frontier, chunk: int
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
    damage: Damage, original: Linear, linear: Linear, before: Frontier, after: Frontier, chunk: int
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


def _mean_error(
    damage: Damage, site: _Site, before: Frontier, after: Frontier, weights: Matrix, bias: Matrix
) -> Matrix:
    """How far the mean outputs are below the targets' means: [groups, out]."""
    total, count = np.zeros(bias.shape), 0
    narrow = weights.astype(np.float32).transpose(0, 2, 1)
    for chunk in range(after.chunks):
        for x, targets, _ in _rows(damage, site, before, after, chunk):
            total += (targets - x @ narrow).sum(axis=1, dtype=np.float64)
            count += x.shape[1]
    return total / max(count, 1) - bias
